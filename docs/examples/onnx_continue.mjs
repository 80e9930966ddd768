// Continues a prompt greedily with cached.onnx of a bundle: node onnx_continue.mjs BUNDLE COUNT ID ID ...
import ort from 'onnxruntime-node';

const [bundle, count, ...prompt] = [process.argv[2], ...process.argv.slice(3).map(Number)];
const session = await ort.InferenceSession.create(`${bundle}/cached.onnx`);
const inputs = session.inputMetadata.filter((input) => input.name.startsWith('cache_'));
const [, heads, , width] = inputs[0].shape;
const slots = prompt.length + count;
const tensor = () => new ort.Tensor('float32', new Float32Array(heads * slots * width), [1, heads, slots, width]);
const cache = Object.fromEntries(inputs.map((input) => [input.name, tensor()]));
const int64 = (ids, dims) => new ort.Tensor('int64', BigInt64Array.from(ids, BigInt), dims);
let [ids, previous, position, answer] = [prompt, 0, 0, []];
while (answer.length < count) {
  const { logits, ...added } = await session.run({
    input_ids: int64(ids, [1, ids.length]), prev_ids: int64([previous], [1, 1]), position: int64([position], [1]),
    logits_to_keep: int64([ids.length - 1], [1]), ...cache });
  for (const kind of ['k', 'v'])
    for (let row = 0, size = ids.length * width; row < (inputs.length / 2) * heads; row++) {
      const past = cache[`cache_${kind}_${Math.floor(row / heads)}`].data;
      past.set(added[`new_${kind}`].data.subarray(row * size, (row + 1) * size), ((row % heads) * slots + position) * width);
    }
  [previous, position] = [ids.at(-1), position + ids.length];
  const last = logits.data.subarray(logits.data.length - logits.dims[2]);
  ids = [last.reduce((best, value, id) => (value > last[best] ? id : best), 0)];
  answer.push(ids[0]);
}
console.log(answer.join(' '));
