// Greedy tokens of a bundle in transformers.js: node generate.mjs REQUEST.json, the answer is JSON on the last line.
// REQUEST holds bundle (folder), input_ids, max_new_tokens, tiles, side, and the raw files pixel_values (float32) and pixel_attention_mask (uint8).
import { readFileSync } from 'node:fs';
import { basename, dirname } from 'node:path';
import { AutoModelForImageTextToText, Tensor, env } from '@huggingface/transformers';

const request = JSON.parse(readFileSync(process.argv[2], 'utf8'));
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = dirname(request.bundle);

// No dtype is given: the bundle's own config names its files' precision.
const model = await AutoModelForImageTextToText.from_pretrained(basename(request.bundle), { device: 'cpu' });

const length = request.input_ids.length;
const { tiles, side } = request;
const pixels = new Float32Array(new Uint8Array(readFileSync(request.pixel_values)).buffer);
const mask = new Uint8Array(readFileSync(request.pixel_attention_mask));
const output = await model.generate({
    input_ids: new Tensor('int64', BigInt64Array.from(request.input_ids, BigInt), [1, length]),
    attention_mask: new Tensor('int64', new BigInt64Array(length).fill(1n), [1, length]),
    pixel_values: new Tensor('float32', pixels, [1, tiles, 3, side, side]),
    pixel_attention_mask: new Tensor('bool', mask, [1, tiles, side, side]),
    max_new_tokens: request.max_new_tokens,
    do_sample: false,
});
console.log(JSON.stringify({ tokens: Array.from(output.data, Number).slice(length), files: Object.keys(model.sessions).sort() }));
