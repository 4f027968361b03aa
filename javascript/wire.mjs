// Frames between `lucid-onnx parity` and its workers; lucid_onnx/parity/wire.py says the same in Python.
// "LXP1", the header's length (4 bytes, little-endian), a header of JSON, and the blobs that its "sizes" list.

import fs from "node:fs";

const MAGIC = Buffer.from("LXP1");

// Byte counts of the elements that a frame may carry. JSON and blobs are plain data, and nothing in them is run.
export const ITEM_SIZES = {
  bool: 1, int8: 1, uint8: 1, int16: 2, uint16: 2, float16: 2, bfloat16: 2,
  int32: 4, uint32: 4, float32: 4, int64: 8, uint64: 8, float64: 8,
};

// A generator of {header, blobs} from a stream; it ends with the stream and throws on anything that is not a frame.
export async function* frames(stream) {
  const pieces = [];
  let have = 0;
  const iterator = stream[Symbol.asyncIterator]();
  async function exactly(count) {
    while (have < count) {
      const next = await iterator.next();
      if (next.done) {
        if (have === 0) return null;
        throw new Error(`the stream ended after ${have} of ${count} bytes`);
      }
      pieces.push(next.value);
      have += next.value.length;
    }
    const all = pieces.length === 1 ? pieces[0] : Buffer.concat(pieces);
    pieces.length = 0;
    if (all.length > count) pieces.push(all.subarray(count));
    have = all.length - count;
    return all.subarray(0, count);
  }
  for (;;) {
    const start = await exactly(8);
    if (start === null) return;
    if (!start.subarray(0, 4).equals(MAGIC)) throw new Error("expected a frame");
    const header = JSON.parse((await exactly(start.readUInt32LE(4))).toString("utf8"));
    const blobs = [];
    for (const size of header.sizes) blobs.push(size === 0 ? Buffer.alloc(0) : await exactly(size));
    yield { header, blobs };
  }
}

export function send(fd, header, blobs = []) {
  const text = Buffer.from(JSON.stringify({ ...header, sizes: blobs.map((b) => b.byteLength) }), "utf8");
  const length = Buffer.alloc(4);
  length.writeUInt32LE(text.length);
  for (const part of [MAGIC, length, text, ...blobs]) {
    let written = 0;
    while (written < part.byteLength) {
      try {
        written += fs.writeSync(fd, part, written, part.byteLength - written);
      } catch (error) {
        if (error.code !== "EAGAIN") throw error; // a pipe that is full for now
      }
    }
  }
}
