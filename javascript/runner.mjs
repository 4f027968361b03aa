// A program on onnxruntime-node or onnxruntime-web, the same code in Node and in the page: load it, run it, and
// look whether every run gives the same bits.

// What each element type travels as between JavaScript and the runtime; bfloat16 has no tensors there.
export const ARRAYS = {
  bool: [Uint8Array, "bool"],
  int8: [Int8Array, "int8"],
  uint8: [Uint8Array, "uint8"],
  int16: [Int16Array, "int16"],
  uint16: [Uint16Array, "uint16"],
  int32: [Int32Array, "int32"],
  uint32: [Uint32Array, "uint32"],
  int64: [BigInt64Array, "int64"],
  uint64: [BigUint64Array, "uint64"],
  float32: [Float32Array, "float32"],
  float64: [Float64Array, "float64"],
  float16: [globalThis.Float16Array ?? Uint16Array, "float16"],
};

export class Unsupported extends Error {}

function tensor(ort, { name, dtype, shape }, bytes) {
  if (!(dtype in ARRAYS)) throw new Unsupported(`JavaScript has no tensors of ${dtype}, which ${name} is of`);
  const [Type, kind] = ARRAYS[dtype];
  const copy = new Uint8Array(bytes).buffer; // aligned, and nobody else's
  return new ort.Tensor(kind, new Type(copy), shape);
}

async function bytesOf(value) {
  const data = await value.getData();
  return new Uint8Array(data.buffer.slice(data.byteOffset, data.byteOffset + data.byteLength));
}

function same(a, b) {
  return a.length === b.length && a.every((x, k) => {
    const y = b[k];
    if (x.dtype !== y.dtype || x.shape.join() !== y.shape.join() || x.bytes.length !== y.bytes.length) return false;
    for (let i = 0; i < x.bytes.length; i++) if (x.bytes[i] !== y.bytes[i]) return false;
    return true;
  });
}

const DTYPES = Object.fromEntries(Object.keys(ARRAYS).map((dtype) => [ARRAYS[dtype][1], dtype]));

export class Runner {
  constructor(ort, options) {
    this.ort = ort;
    this.options = options;
    this.session = null;
  }

  async load(model) {
    const old = this.session;
    this.session = null;
    if (old) await old.release();
    this.session = await this.ort.InferenceSession.create(model, { logSeverityLevel: 4, ...this.options });
  }

  async once(feeds) {
    const results = await this.session.run(feeds, { logSeverityLevel: 4 });
    const outputs = [];
    for (const name of this.session.outputNames) {
      const value = results[name];
      const dtype = DTYPES[value.type];
      if (dtype === undefined) throw new Unsupported(`JavaScript has no tensors of ${value.type}`);
      outputs.push({ name, dtype, shape: Array.from(value.dims), bytes: await bytesOf(value) });
      value.dispose?.();
    }
    return outputs;
  }

  // Up to `runs` runs while `seconds` last, at least two where that is allowed.
  async run(inputs, blobs, runs, seconds) {
    if (this.session === null) throw new Error("no program was loaded");
    const feeds = {};
    inputs.forEach((input, k) => (feeds[input.name] = tensor(this.ort, input, blobs[k])));
    let first = null, other = null, differing = 0;
    const times = [];
    const start = performance.now();
    while (times.length < runs && (times.length < 2 || performance.now() - start < 1000 * seconds)) {
      const begin = performance.now();
      const outputs = await this.once(feeds);
      times.push((performance.now() - begin) / 1000);
      if (first === null) first = outputs;
      else if (!same(first, outputs)) {
        differing += 1;
        other ??= outputs;
      }
    }
    times.sort((a, b) => a - b);
    return { runs: times.length, differing, seconds: times[times.length >> 1], first, other };
  }
}
