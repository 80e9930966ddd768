// Continues a prompt greedily with cached.onnx of a bundle: node onnx_continue.mjs BUNDLE COUNT ID ID ...
import ort from 'onnxruntime-node';

const [bundle, count, ...prompt] = [process.argv[2], ...process.argv.slice(3).map(Number)];
const session = await ort.InferenceSession.create(`${bundle}/cached.onnx`);
const [layers, , heads, , width] = session.inputMetadata.find((input) => input.name === 'cache_k').shape;
const slots = prompt.length + count;
const cache = { k: new Float32Array(layers * heads * slots * width), v: new Float32Array(layers * heads * slots * width) };
const int64 = (ids, dims) => new ort.Tensor('int64', BigInt64Array.from(ids, BigInt), dims);
const past = (data) => new ort.Tensor('float32', data, [layers, 1, heads, slots, width]);
let [ids, previous, position, answer] = [prompt, 0, 0, []];
while (answer.length < count) {
  const { logits, new_k, new_v } = await session.run({
    input_ids: int64(ids, [1, ids.length]), prev_ids: int64([previous], [1, 1]), position: int64([position], [1]),
    cache_k: past(cache.k), cache_v: past(cache.v) });
  for (let row = 0, size = ids.length * width; row < layers * heads; row++) {
    cache.k.set(new_k.data.subarray(row * size, (row + 1) * size), (row * slots + position) * width);
    cache.v.set(new_v.data.subarray(row * size, (row + 1) * size), (row * slots + position) * width);
  }
  [previous, position] = [ids.at(-1), position + ids.length];
  const last = logits.data.subarray(logits.data.length - logits.dims[2]);
  ids = [last.reduce((best, value, id) => (value > last[best] ? id : best), 0)];
  answer.push(ids[0]);
}
console.log(answer.join(' '));
