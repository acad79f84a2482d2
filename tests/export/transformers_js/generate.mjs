// Greedy tokens of a bundle in transformers.js: node generate.mjs REQUEST.json, the answer is JSON on the last line.
// REQUEST holds bundle (folder), input_ids, max_new_tokens, and tensors: name -> {type, dims, file}, the file being the raw numbers.
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
const ARRAYS = { float32: Float32Array, int64: BigInt64Array, bool: Uint8Array };
const tensors = Object.fromEntries(
    Object.entries(request.tensors).map(([name, { type, dims, file }]) => [
        name,
        new Tensor(type, new ARRAYS[type](new Uint8Array(readFileSync(file)).buffer), dims),
    ]),
);
const output = await model.generate({
    input_ids: new Tensor('int64', BigInt64Array.from(request.input_ids, BigInt), [1, length]),
    attention_mask: new Tensor('int64', new BigInt64Array(length).fill(1n), [1, length]),
    ...tensors,
    max_new_tokens: request.max_new_tokens,
    do_sample: false,
});
console.log(JSON.stringify({ tokens: Array.from(output.data, Number).slice(length), files: Object.keys(model.sessions).sort() }));
