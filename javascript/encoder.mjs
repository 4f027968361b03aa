// Texts to what a model says of them, by the file beside it that `lucid-onnx import` wrote; the same code in Node and in
// the page. lucid_onnx/sources/encoder.py does the same in Python, with the same ids.

import { FastTextWords } from "./fasttext.mjs";
import { Tokenizer } from "./tokenizer.mjs";
import { BadText } from "./values.mjs";
import { Words } from "./words.mjs";

const KINDS = Object.fromEntries([Tokenizer, Words, FastTextWords].map((kind) => [kind.kind, kind]));
const PADDED = ["input_ids", "attention_mask"], RAGGED = ["ids", "offsets"];
const INTEGERS = { int32: [Int32Array, Number], int64: [BigInt64Array, BigInt] };

// What a model's metadata says of its texts: {kind, file, sha256, settings}. `found` is model.mjs's `text`.
export function described(model, found) {
  let entry;
  try {
    entry = JSON.parse(found);
  } catch (error) {
    throw new BadText(`${model}: its metadata lucid.text is not JSON: ${error.message}`);
  }
  const { kind, file, sha256, ...settings } = entry ?? {};
  if (![kind, file, sha256].every((value) => typeof value === "string")) {
    throw new BadText(`${model}: its metadata lucid.text has no kind, file and sha256`);
  }
  if (!Object.hasOwn(KINDS, kind)) {
    throw new BadText(`${model}: its texts are encoded by ${kind.slice(0, 40)}, which is not one of ${Object.keys(KINDS).join(", ")}`);
  }
  if (!/^[^/\\:\0]+$/.test(file) || file === "." || file === "..") {
    throw new BadText(`${model}: its metadata lucid.text names the file ${file.slice(0, 100)}, outside of the model's folder`);
  }
  return { kind, file, sha256, settings };
}

// What encodes texts, from the content of its file. `tokenizers` gives the package @huggingface/tokenizers.
export async function openText(model, { kind, file, sha256, settings }, content, tokenizers) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  const hex = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (hex !== sha256) throw new BadText(`${file}: is not the file that ${model} was written with; import the model again`);
  return KINDS[kind].load(file, settings, content, tokenizers);
}

// {name: [numbers, shape]}, as the inputs of a model that has these.
function feedsOf(text, texts, names) {
  if (text.feeds) return text.feeds(texts);
  const lists = texts.map((one) => text.ids(one));
  if (names.includes("ids")) {
    let at = 0;
    const offsets = lists.map((ids) => (at += ids.length) - ids.length);
    return { ids: [lists.flat(), [at]], offsets: [offsets, [offsets.length]] };
  }
  const length = lists.reduce((most, ids) => Math.max(most, ids.length), 0);
  const shape = [lists.length, length];
  const padded = (value) => lists.flatMap((ids) => Array.from({ length }, (_, k) => (k < ids.length ? value(ids[k]) : 0)));
  return { input_ids: [padded((id) => id), shape], attention_mask: [padded(() => 1), shape] };
}

function halfToNumber(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

async function plain(name, tensor) {
  const data = await tensor.getData();
  if (tensor.type === "float16") return Array.from(data, data instanceof Uint16Array ? halfToNumber : Number);
  if (!["float32", "float64", "string"].includes(tensor.type)) throw new BadText(`${name} is of ${tensor.type}, which is not shown here.`);
  return Array.from(data);
}

// A session of onnxruntime-node or onnxruntime-web, and what encodes its texts.
export class Encoder {
  constructor(model, ort, session, text) {
    Object.assign(this, { ort, session, text });
    const takes = session.inputMetadata.map(({ name, type }) => `${name} ${type}`);
    const fits = (text.inputs ?? [PADDED, RAGGED]).some((names) =>
      [...names].sort().join() === [...session.inputNames].sort().join());
    if (!fits || session.inputMetadata.some(({ type }) => !(type in INTEGERS))) {
      throw new BadText(`${model}: takes ${takes.join(", ") || "nothing"}, which no ids of texts are`);
    }
  }

  // Whether it labels texts.
  get hasLabels() {
    return this.session.inputNames.includes("k");
  }

  // The outputs of texts, {name: {dims, data}} in the model's order; `k` is how many labels each gets.
  async run(texts, k = 1) {
    const { session, ort } = this;
    const given = feedsOf(this.text, texts, session.inputNames);
    if (this.hasLabels) given.k = [[k], [1]];
    const feeds = {};
    for (const { name, type } of session.inputMetadata) {
      const [Type, number] = INTEGERS[type];
      const [numbers, shape] = given[name];
      feeds[name] = new ort.Tensor(type, Type.from(numbers, number), shape);
    }
    const results = await session.run(feeds, { logSeverityLevel: 4 });
    const outputs = {};
    for (const name of session.outputNames) {
      outputs[name] = { dims: Array.from(results[name].dims), data: await plain(name, results[name]) };
      results[name].dispose?.();
    }
    return outputs;
  }

  // The labels of a text, the most probable first: [[label, probability]].
  async predict(text, k) {
    const { labels, probabilities } = await this.run([text], k);
    return labels.data.map((label, at) => [label, probabilities.data[at]]).filter(([label]) => label !== "");
  }

  // The vectors of texts: the model's first output.
  async encode(texts) {
    const { dims, data } = (await this.run(texts))[this.session.outputNames[0]];
    const width = dims.at(-1);
    return texts.map((_, k) => data.slice(k * width, (k + 1) * width));
  }

  // The texts by the cosine between their vectors and the query's, the best first: [[number of the text, cosine]]. Texts
  // whose vector is zero, since none of their words is known, are left out.
  async search(query, texts) {
    const [wanted, ...vectors] = await this.encode([query, ...texts]);
    const length = Math.hypot(...wanted);
    if (length === 0) throw new BadText("The model knows no word of the query.");
    const hits = [];
    vectors.forEach((vector, number) => {
      const product = vector.reduce((sum, value, k) => sum + value * wanted[k], 0);
      const size = Math.hypot(...vector);
      if (size > 0) hits.push([number, product / (size * length)]);
    });
    return hits.sort(([, a], [, b]) => b - a);
  }
}
