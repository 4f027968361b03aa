// What a model says of texts: node text.mjs [--json] MODEL TEXT...
// A classifier prints the best labels of each text. Any other model prints the vector of one text; of several, the first is a
// query, and the others are printed by their cosine with it. --json prints ids and all outputs.

import { createRequire } from "node:module";
import path from "node:path";
import { parseArgs } from "node:util";

import { Encoder, openText } from "./encoder.mjs";
import { content, filesOf } from "./files.mjs";
import { BadText } from "./values.mjs";

const MOST_LABELS = 5;
const shown = (value) => String(Number(value.toPrecision(6)));

async function open(model) {
  const { text, paths } = filesOf(model);
  const name = path.basename(model);
  if (text === null) throw new BadText(`${name}: its metadata does not say what encodes texts: it was not imported`);
  const encodes = await openText(name, text, content(paths.at(-1)), () => import("@huggingface/tokenizers"));
  let ort;
  try {
    ort = createRequire(import.meta.url)("onnxruntime-node");
  } catch {
    throw new BadText("the packages of this folder are not installed: npm ci --ignore-scripts");
  }
  const session = await ort.InferenceSession.create(model, { executionProviders: ["cpu"], logSeverityLevel: 4 });
  return new Encoder(name, ort, session, encodes);
}

async function main() {
  const { values, positionals } = parseArgs({ options: { json: { type: "boolean" } }, allowPositionals: true });
  const [model, ...texts] = positionals;
  if (texts.length === 0) throw new BadText("usage: node text.mjs [--json] MODEL TEXT...");
  const encoder = await open(model);
  if (values.json) {
    const outputs = await encoder.run(texts, MOST_LABELS);
    return console.log(JSON.stringify({ ids: texts.map((text) => encoder.text.ids(text)), outputs }));
  }
  if (encoder.hasLabels) {
    for (const text of texts) {
      if (texts.length > 1) console.log(text);
      for (const [label, probability] of await encoder.predict(text, MOST_LABELS)) console.log(`${shown(probability)}\t${label}`);
    }
  } else if (texts.length === 1) console.log((await encoder.encode(texts))[0].map(shown).join(" "));
  else {
    const [query, ...lines] = texts;
    for (const [number, cosine] of await encoder.search(query, lines)) console.log(`${shown(cosine)}\t${lines[number]}`);
  }
}

try {
  await main();
} catch (error) {
  console.error(String(error.message ?? error));
  process.exitCode = 1;
}
