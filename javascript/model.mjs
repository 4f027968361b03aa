// What the runtime does not tell of a model's file: its bags, the rows of its tables, the files that it lies in.
// A reader of just those fields of ONNX's protobuf; onnx.proto has their numbers.

const DOMAIN = "ai.lucid";
const TEXTS = "lucid.text";
const NO_PADDING = -(2n ** 63n);
const MODES = ["sum", "mean", "max"];
// Nodes that hand their first input on, as far as the values of indices and offsets go.
const PASSING = new Set(["Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"]);

const text = (bytes) => new TextDecoder().decode(bytes);

// {number, value} for each field of a message: a BigInt of a varint, a view of anything that has a length.
function* fields(bytes) {
  let at = 0;
  function varint() {
    let value = 0n;
    for (let shift = 0n; shift < 70n; shift += 7n) {
      if (at >= bytes.length) throw new Error("the file ends within a number");
      const byte = bytes[at++];
      value |= BigInt(byte & 127) << shift;
      if (byte < 128) return BigInt.asIntN(64, value);
    }
    throw new Error(`a number before byte ${at} has no end`);
  }
  while (at < bytes.length) {
    const key = Number(varint());
    const kind = key & 7;
    if (kind === 0) {
      yield { number: key >> 3, value: varint() };
      continue;
    }
    const length = kind === 2 ? Number(varint()) : kind === 5 ? 4 : kind === 1 ? 8 : NaN;
    if (!(length >= 0 && at + length <= bytes.length)) throw new Error(`the field at byte ${at} is not whole`);
    yield { number: key >> 3, value: bytes.subarray(at, at + length) };
    at += length;
  }
}

function node(bytes) {
  const found = { inputs: [], outputs: [], op: "", domain: "", attributes: {} };
  for (const { number, value } of fields(bytes)) {
    if (number === 1) found.inputs.push(text(value));
    else if (number === 2) found.outputs.push(text(value));
    else if (number === 4) found.op = text(value);
    else if (number === 7) found.domain = text(value);
    else if (number === 5) {
      let name = "", i = 0n;
      for (const field of fields(value)) {
        if (field.number === 1) name = text(field.value);
        else if (field.number === 3) i = field.value;
      }
      found.attributes[name] = i;
    }
  }
  return found;
}

function initializer(bytes) {
  const found = { name: "", dims: [], file: null };
  for (const { number, value } of fields(bytes)) {
    if (number === 1 && typeof value === "bigint") found.dims.push(Number(value));
    else if (number === 1) { // packed: as the payload of a message whose fields are bare numbers
      let dim = 0n, shift = 0n;
      for (const byte of value) {
        dim |= BigInt(byte & 127) << shift;
        shift += 7n;
        if (byte < 128) {
          found.dims.push(Number(dim));
          dim = shift = 0n;
        }
      }
    } else if (number === 8) found.name = text(value);
    else if (number === 13) {
      const entry = Object.fromEntries([...fields(value)].map((field) => [field.number, text(field.value)]));
      if (entry[1] === "location") found.file = entry[2];
    }
  }
  return found;
}

// The names that a bag's inputs go by, in order; the operator's name says which there are.
function rolesOf(op) {
  const table = !op.startsWith("Quantized") ? ["weight"]
    : ["codes", "scale", ...(op.includes("ZeroPoint") ? ["zero_point"] : op.includes("Bias") ? ["bias"] : [])];
  const offsets = op.includes("2D") ? [] : ["offsets"];
  return [...table, "indices", ...offsets, ...(op.endsWith("Weighted") ? ["per_sample_weights"] : [])];
}

// Of a model's bytes:
//   bags   [{op, mode, padding, table: dims or null}], its ai.lucid nodes
//   roles  of inputs of the graph: {name: {kind, rows, last, partner}}; rows is the smallest table's, null if it is an
//          input; last is include_last_offset; partner names the indices that offsets and weights belong to
//   rows   of the smallest table that is looked up by computed numbers, as the standard form does; or null
//   files  the names of its files of external data
//   text   its metadata entry that says what encodes texts, which encoder.mjs reads; or null
// Throws where the bytes are no protobuf.
export function read(bytes) {
  const nodes = [], tables = new Map(), files = new Set();
  let texts = null;
  for (const part of fields(bytes)) {
    if (part.number === 14) {
      const entry = Object.fromEntries([...fields(part.value)].map((field) => [field.number, text(field.value)]));
      if (entry[1] === TEXTS) texts = entry[2] ?? "";
    }
    if (part.number !== 7) continue;
    for (const { number, value } of fields(part.value)) {
      if (number === 1) nodes.push(node(value));
      else if (number === 5) {
        const found = initializer(value);
        tables.set(found.name, found.dims);
        if (found.file !== null) files.add(found.file);
      }
    }
  }
  const makers = new Map(nodes.flatMap((maker) => maker.outputs.map((output) => [output, maker])));
  const origin = (name) => {
    for (let maker = makers.get(name); maker && PASSING.has(maker.op); maker = makers.get(name)) name = maker.inputs[0];
    return name;
  };
  const bags = [], roles = Object.create(null);
  let rows = null;
  const indices = (name, rows) => {
    const old = roles[name]?.rows;
    roles[name] = { kind: "indices", rows: old == null ? rows : rows == null ? old : Math.min(old, rows) };
  };
  for (const { op, domain, inputs, attributes } of nodes) {
    if (domain === DOMAIN && /^(Quantized)?EmbeddingBag/.test(op)) {
      const dims = tables.get(inputs[0]) ?? null;
      const padding = attributes.padding_idx ?? NO_PADDING;
      bags.push({
        op, mode: MODES[Number(attributes.mode)], table: dims, padding: padding === NO_PADDING ? null : Number(padding),
      });
      const kinds = rolesOf(op).slice(0, inputs.length);
      const partner = origin(inputs[kinds.indexOf("indices")]);
      const last = attributes.include_last_offset === 1n;
      kinds.forEach((kind, k) => {
        const name = origin(inputs[k]);
        if (kind === "indices") indices(name, dims === null ? null : dims[0]);
        else if (kind === "offsets") roles[name] = { kind, last, partner };
        else roles[name] = kind === "per_sample_weights" ? { kind, partner } : { kind };
      });
    } else if (op === "Gather" && domain === "" && tables.get(inputs[0])?.length === 2 && !attributes.axis) {
      const name = origin(inputs[1]);
      const [count] = tables.get(inputs[0]);
      if (!makers.has(name)) indices(name, count);
      else rows = Math.min(rows ?? count, count);
    }
  }
  return { bags, roles, rows, files: [...files], text: texts };
}
