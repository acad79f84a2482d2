// What transformers.js makes of a question about an image file, by the bundle's own processor and template: node prompt.mjs BUNDLE IMAGE QUESTION.
import { basename, dirname } from 'node:path';
import { AutoProcessor, env, load_image } from '@huggingface/transformers';

const [bundle, image, question] = process.argv.slice(2);
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = dirname(bundle);

const processor = await AutoProcessor.from_pretrained(basename(bundle));
const messages = [{ role: 'user', content: [{ type: 'image' }, { type: 'text', text: question }] }];
const text = processor.apply_chat_template(messages, { add_generation_prompt: true });
const inputs = await processor(text, await load_image(image));
console.log(JSON.stringify({ ids: Array.from(inputs.input_ids.data, Number), dims: inputs.pixel_values.dims }));
