// The files of a model on disk: the model, its external data, and what encodes its texts.

import fs from "node:fs";
import path from "node:path";

import { described } from "./encoder.mjs";
import { read } from "./model.mjs";
import { BadText } from "./values.mjs";

// {bytes, facts, text, paths}: the model's bytes, what model.mjs reads in them, what they say of its texts or null, and the paths of
// all its files, the model first. Throws BadText where one is missing.
export function filesOf(model) {
  const name = path.basename(model);
  const bytes = content(model);
  let facts;
  try {
    facts = read(bytes);
  } catch (error) {
    throw new BadText(`${name}: is not an ONNX model, or only a part of one: ${error.message}`);
  }
  const text = facts.text === null ? null : described(name, facts.text);
  const folder = path.dirname(model);
  const paths = [...facts.files, ...(text ? [text.file] : [])].map((other) => {
    const inside = path.relative(folder, path.resolve(folder, other));
    if (inside.startsWith("..") || path.isAbsolute(inside)) throw new BadText(`${name}: names the file ${other}, outside of its folder`);
    const found = path.join(folder, inside);
    if (!fs.statSync(found, { throwIfNoEntry: false })?.isFile()) throw new BadText(`${name}: there is no ${other} beside it`);
    return found;
  });
  return { bytes, facts, text, paths: [model, ...paths] };
}

export function content(file) {
  try {
    return new Uint8Array(fs.readFileSync(file));
  } catch (error) {
    throw new BadText(`${file}: cannot be read: ${error.message}`);
  }
}
