// transformers.js on Node as a peer: node runtime_javascript.mjs BUNDLE THREADS, orders and answers are lines of JSON.
import { basename, dirname } from 'node:path';
import { createInterface } from 'node:readline';
import { AutoModelForImageTextToText, AutoProcessor, BaseStreamer, Tensor, env, load_image } from '@huggingface/transformers';

const [bundle, threads] = process.argv.slice(2);
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = dirname(bundle);

class Clock extends BaseStreamer {
    constructor() {
        super();
        this.start = performance.now();
        this.times = [];
    }
    put() {
        this.times.push((performance.now() - this.start) / 1000);
    }
    end() {}
}

// No dtype is given: the bundle's own config names its files' precision.
const session_options = { intraOpNumThreads: Number(threads), interOpNumThreads: 1 };
const model = await AutoModelForImageTextToText.from_pretrained(basename(bundle), { device: 'cpu', session_options });
const processor = await AutoProcessor.from_pretrained(basename(bundle));

async function generate(clock, inputs, tokens) {
    await model.generate({ ...inputs, max_new_tokens: tokens, min_new_tokens: tokens, do_sample: false, streamer: clock });
    return { times: clock.times.slice(1), prompt: inputs.input_ids.dims.at(-1) }; // the prompt itself comes first
}

async function answer({ picture, question, tokens }) {
    const clock = new Clock();
    const messages = [{ role: 'user', content: [{ type: 'image' }, { type: 'text', text: question }] }];
    const text = processor.apply_chat_template(messages, { add_generation_prompt: true });
    return generate(clock, await processor(text, await load_image(picture)), tokens);
}

async function decode({ context, tokens }) {
    const ids = BigInt64Array.from({ length: context }, (_, position) => BigInt(100 + position));
    const dims = [1, context];
    return generate(new Clock(), { input_ids: new Tensor('int64', ids, dims), attention_mask: new Tensor('int64', ids.map(() => 1n), dims) }, tokens);
}

console.log(JSON.stringify({ ready: true }));
for await (const line of createInterface({ input: process.stdin })) {
    const order = JSON.parse(line);
    console.log(JSON.stringify(await (order.do === 'answer' ? answer(order) : decode(order))));
}
