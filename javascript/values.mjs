// Text that a person types, as tensors, and made-up text that is legal for a model.

import { ARRAYS } from "./runner.mjs";

const INTEGERS = {
  int8: [-(2n ** 7n), 2n ** 7n], uint8: [0n, 2n ** 8n], int16: [-(2n ** 15n), 2n ** 15n], uint16: [0n, 2n ** 16n],
  int32: [-(2n ** 31n), 2n ** 31n], uint32: [0n, 2n ** 32n], int64: [-(2n ** 63n), 2n ** 63n], uint64: [0n, 2n ** 64n],
};
const SPECIAL = { nan: NaN, inf: Infinity, "+inf": Infinity, "-inf": -Infinity, infinity: Infinity, "-infinity": -Infinity };

export class BadText extends Error {}

// A text as it is, if UTF-8 can write it.
export function wellFormed(text) {
  if (/\p{Surrogate}/u.test(text)) throw new BadText("The text has half a surrogate pair, which is not a character.");
  return text;
}

const fixed = (dim) => typeof dim === "number" && dim >= 0;
export const shapeText = (shape) => `[${shape.map((dim) => (fixed(dim) || (typeof dim === "string" && dim) ? dim : "?")).join(", ")}]`;

// Numbers in JSON's brackets, nested; they stay text, for an int64 is more than JSON's numbers hold.
function nested(text) {
  const tokens = text.match(/[[\],]|[^[\],\s]+/g) ?? [];
  let at = 0;
  function value() {
    const token = tokens[at++];
    if (token === undefined) throw new BadText("a closing bracket ] is missing");
    if (token === "]" || token === ",") throw new BadText(`a number is missing before ${token}`);
    if (token !== "[") return token;
    const list = [];
    if (tokens[at] === "]") {
      at++;
      return list;
    }
    for (;;) {
      list.push(value());
      const next = tokens[at++];
      if (next === "]") return list;
      if (next !== ",") throw new BadText(next === undefined ? "a closing bracket ] is missing" : `a comma is missing before ${next}`);
    }
  }
  const whole = value();
  if (at < tokens.length) throw new BadText(`there is more after the last bracket: ${tokens[at]}`);
  return whole;
}

// The shape of nested lists, and their numbers in order.
function flatten(list) {
  const numbers = [];
  function walk(item, where) {
    if (!Array.isArray(item)) {
      numbers.push(item);
      return [];
    }
    let inner = null;
    item.forEach((one, k) => {
      const shape = walk(one, [...where, k]);
      if (inner !== null && inner.join() !== shape.join()) {
        throw new BadText(`row ${[...where, k].join(", ")} is ${shapeText(shape)} long, but the ones before it are ${shapeText(inner)}`);
      }
      inner ??= shape;
    });
    return [item.length, ...(inner ?? [])];
  }
  return { shape: walk(list, []), numbers };
}

// Bytes and shape of what was typed for an input; `meta` is the runtime's {name, type, shape}.
// Numbers stand between commas or spaces, a line for each row of a 2-D input, or in JSON's brackets.
export function parse(typed, meta) {
  if (!meta.isTensor || !(meta.type in ARRAYS)) {
    throw new BadText(`${meta.name} is ${meta.isTensor ? `of type ${meta.type}` : "not a tensor"}, which cannot be typed in`);
  }
  const { name, type, shape: wanted } = meta;
  const [Type, kind] = ARRAYS[type];
  if (kind === "float16" && !globalThis.Float16Array) throw new BadText(`${name}: this browser has no numbers of float16`);
  let found;
  try {
    const body = typed.trim();
    if (body.startsWith("[")) found = flatten(nested(body));
    else {
      const lines = body.split("\n").map((line) => line.split(/[\s,]+/).filter(Boolean)).filter((line) => line.length);
      // The runtime says [] of a scalar and of an unknown shape alike.
      if (wanted.length === 0 && lines.flat().length === 1) found = { shape: [], numbers: lines.flat() };
      else found = flatten(wanted.length > 1 ? lines : lines.flat());
    }
    let { shape } = found;
    if (found.numbers.length === 0) shape = [...shape, ...wanted.slice(shape.length).map((dim) => (fixed(dim) ? dim : 0))];
    const fits = shape.length === wanted.length && wanted.every((dim, k) => !fixed(dim) || dim === shape[k]);
    if (wanted.length > 0 && !fits) throw new BadText(`its shape is ${shapeText(shape)}, but the model takes ${shapeText(wanted)}`);
    const array = new Type(found.numbers.length);
    found.numbers.forEach((token, k) => (array[k] = number(token, k, kind, type)));
    found.numbers.forEach((token, k) => {
      if (typeof array[k] === "number" && !Number.isFinite(array[k]) && !(token.toLowerCase() in SPECIAL)) {
        throw new BadText(`${token} (position ${k}) is too large for ${type}`);
      }
    });
    return { name, dtype: type, shape, bytes: new Uint8Array(array.buffer) };
  } catch (error) {
    if (error instanceof BadText) throw new BadText(`${name}: ${error.message}`);
    throw error;
  }
}

function number(token, k, kind, type) {
  if (kind === "bool") {
    if (/^(0|1|true|false)$/i.test(token)) return /^(1|true)$/i.test(token) ? 1 : 0;
    throw new BadText(`${token} (position ${k}) is neither true nor false`);
  }
  if (kind in INTEGERS) {
    if (!/^[+-]?\d+$/.test(token)) throw new BadText(`${token} (position ${k}) is not an integer`);
    const value = BigInt(token.replace("+", ""));
    const [low, high] = INTEGERS[kind];
    if (value < low || value >= high) throw new BadText(`${token} (position ${k}) is outside ${type}`);
    return kind.endsWith("64") ? value : Number(value);
  }
  if (token.toLowerCase() in SPECIAL) return SPECIAL[token.toLowerCase()];
  if (!/^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(token)) throw new BadText(`${token} (position ${k}) is not a number`);
  return Number(token);
}

const TABLES = new Set(["weight", "codes", "scale", "zero_point", "bias"]);
const roleOf = (name, facts) => facts.roles[name] ?? { kind: name, rows: facts.rows, partner: "indices" };

// The operator's rule that inputs break, by argument, value and position, for a model that rejected them; null if none
// is seen. What a graph of standard operators says itself is about a Gather somewhere within it.
export function broken(inputs, facts) {
  const shape = Object.fromEntries(inputs.map((input) => [input.name, input.shape]));
  const table = inputs.find((input) => TABLES.has(roleOf(input.name, facts).kind));
  for (const input of inputs) {
    const { name } = input;
    const { kind, rows: known, partner } = roleOf(name, facts);
    const rows = known ?? table?.shape[0] ?? null;
    if (kind === "per_sample_weights" && shape[partner] && shape[partner].join() !== input.shape.join()) {
      return `${name}: its shape is ${shapeText(input.shape)}, but that of ${partner} is ${shapeText(shape[partner])}.`;
    }
    if (kind !== "indices" && kind !== "offsets") continue;
    const values = [...new ARRAYS[input.dtype][0](input.bytes.buffer)].map(Number);
    if (kind === "indices" && rows !== null) {
      const k = values.findIndex((value) => value < 0 || value >= rows);
      if (k >= 0) return `${name}: ${values[k]} (position ${k}) is outside the table, which has ${rows} rows.`;
    }
    if (kind === "offsets" && shape[partner]?.length === 1) {
      const [count] = shape[partner];
      if (values.length === 0) return `${name}: there are none, for ${count} indices.`;
      if (values[0] !== 0) return `${name}: the first is ${values[0]}, and must be 0.`;
      const k = values.findIndex((value, i) => value > count || (i > 0 && value < values[i - 1]));
      if (k >= 0) {
        const why = values[k] > count ? `past the ${count} indices` : `less than the one before it, ${values[k - 1]}`;
        return `${name}: ${values[k]} (position ${k}) is ${why}.`;
      }
    }
  }
  return null;
}

const BAGS = 3, LENGTH = 2, ROWS = 8, OTHER = 4;

// Text for every input: {name: text}. `facts` are read()'s; inputs without a role go by their names, as those of
// lucid_onnx.build_model do. Indices stay below the smallest table, or below 2 where its rows are not known.
export function madeUp(metadata, facts) {
  const sizes = Object.create(null);
  const role = ({ name }) => roleOf(name, facts);
  const size = (meta, axis, usual) => {
    const dim = meta.shape[axis];
    return fixed(dim) ? dim : typeof dim === "string" && dim ? (sizes[dim] ??= usual) : usual;
  };
  const shapes = Object.create(null);
  // Tables before indices, for their rows; indices before weights and offsets, for their number.
  for (const meta of metadata.filter((one) => TABLES.has(role(one).kind))) {
    shapes[meta.name] = meta.shape.map((_, axis) => size(meta, axis, axis === 0 ? ROWS : OTHER));
  }
  const rowsGiven = Object.values(shapes).map(([rows]) => rows);
  let count = BAGS * LENGTH;
  const texts = Object.create(null);
  const rank = (meta) => ("indices" === role(meta).kind ? 0 : 1);
  for (const meta of [...metadata].sort((a, b) => rank(a) - rank(b))) {
    if (!meta.isTensor || !(meta.type in ARRAYS)) {
      texts[meta.name] = "";
      continue;
    }
    const { kind, rows, last } = role(meta);
    if (kind === "offsets") {
      // Of unknown kind they end with the number of indices, which is legal either way.
      const ends = last ?? meta.shape[0] !== "num_bags";
      const length = fixed(meta.shape[0]) ? meta.shape[0] : BAGS + (ends ? 1 : 0);
      const bags = Math.max(1, ends ? length - 1 : length);
      texts[meta.name] = Array.from({ length }, (_, k) => Math.floor(count * Math.sqrt(k / bags))).join(", ");
      continue;
    }
    const flat = meta.shape.length < 2;
    const shape = shapes[meta.name] ?? meta.shape.map((_, axis) => size(meta, axis, flat ? BAGS * LENGTH : axis === 0 ? BAGS : LENGTH));
    let total = shape.reduce((a, b) => a * b, 1);
    let make = (k) => (k % 7) / 4 - 0.5;
    if (kind === "indices") {
      const limit = Math.min(rows ?? Infinity, ...rowsGiven);
      // A table without rows has no index: bags are empty there.
      if (limit === 0 && !fixed(meta.shape[0])) total = shape[0] = 0;
      make = (k) => (3 * k + 1) % Math.max(1, Number.isFinite(limit) ? limit : 2);
      if (flat) count = total;
    } else if (kind === "per_sample_weights") make = (k) => [1, 0.5, 2][k % 3];
    else if (meta.type === "bool" || meta.type in INTEGERS) make = (k) => k % 2;
    const numbers = Array.from({ length: total }, (_, k) => make(k));
    if (flat) texts[meta.name] = numbers.join(", ");
    else texts[meta.name] = shape.length === 2 && total > 0 ? lines(numbers, shape[1]) : JSON.stringify(fold(numbers, shape));
  }
  return texts;
}

function lines(numbers, width) {
  return Array.from({ length: numbers.length / width }, (_, k) => numbers.slice(k * width, (k + 1) * width).join(", ")).join("\n");
}

function fold(numbers, shape) {
  if (shape.length < 2) return numbers;
  const step = shape.slice(1).reduce((a, b) => a * b, 1);
  return Array.from({ length: shape[0] }, (_, k) => fold(numbers.slice(k * step, (k + 1) * step), shape.slice(1)));
}
