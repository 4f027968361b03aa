// fastText's texts as rows of its table. The file is the start of fastText's own, which lucid_onnx/sources/fasttext/reader.py
// reads and words.py hashes; the ids here are the ids there.

import { BadText, wellFormed } from "./values.mjs";

const MAGIC = 793712314;
const SUPERVISED = 3, MODELS = 3, LOSSES = 4;
const LONGEST_NGRAM = 1000;
const ENTRY = 10; // bytes of an entry of the dictionary beside its text
const FIRST = 2166136261, PRIME = 16777619, NGRAM_FACTOR = 116049371n;
const LOW = -(2 ** 31), HIGH = 2 ** 31 - 1;
// Bytes as a string of as many characters: windows-1252 gives each byte a character of its own.
const BYTES = new TextDecoder("windows-1252");
const key = (bytes) => BYTES.decode(bytes);
const END = new TextEncoder().encode("</s>");
const END_KEY = key(END), LABEL_KEY = "__label__";

// Reads one field after another.
class Reader {
  constructor(name, bytes) {
    this.name = name;
    this.bytes = bytes;
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.at = 0;
  }

  fail(field, what, at = this.at) {
    throw new BadText(`${this.name}: broken fastText model: ${field} at byte ${at} ${what}`);
  }

  take(field, count) {
    const left = this.bytes.length - this.at;
    if (count > left) this.fail(field, `takes ${count} bytes, and the file has ${left} more`);
    this.at += count;
    return this.at - count;
  }

  int(field, low = LOW, high = HIGH) {
    const begin = this.take(field, 4);
    return this.checked(field, this.view.getInt32(begin, true), low, high, begin);
  }

  long(field, low, high) {
    const begin = this.take(field, 8);
    return Number(this.checked(field, this.view.getBigInt64(begin, true), low, high, begin));
  }

  checked(field, value, low, high, begin) {
    if (value < low || value > high) this.fail(field, `is ${value}, expected in [${low}, ${high}]`, begin);
    return value;
  }
}

// What a file says before its tables. Throws BadText, with the field and the byte, where it is something else.
function readHead(name, bytes) {
  const file = new Reader(name, bytes);
  if (bytes.length < 4 || file.view.getInt32(0, true) !== MAGIC) throw new BadText(`${name}: not a fastText model`);
  file.at = 4;
  const version = file.int("version");
  if (version !== 11 && version !== 12) throw new BadText(`${name}: a fastText model of version ${version}, expected 11 or 12`);
  file.int("dim", 1);
  for (const field of ["ws", "epoch", "min_count", "neg"]) file.int(field);
  const wordNgrams = file.int("word_ngrams", LOW, LONGEST_NGRAM);
  file.int("loss", 1, LOSSES);
  const supervised = file.int("model", 1, MODELS) === SUPERVISED;
  const bucket = file.int("bucket", 0);
  const minn = file.int("minn");
  let maxn = file.int("maxn", LOW, LONGEST_NGRAM);
  file.int("lr_update_rate");
  file.take("t", 8);
  if (version === 11 && supervised) maxn = 0; // such models have no subwords, whatever they say

  const most = Math.floor((bytes.length - file.at) / ENTRY);
  const begin = file.at;
  const size = file.int("the number of entries", 0, most);
  const numWords = file.int("the number of words", 0, size);
  const numLabels = file.int("the number of labels", size - numWords, size - numWords);
  file.take("the number of tokens", 8);
  const numKept = file.long("the number of kept n-grams", -1, most);
  if (supervised && numLabels === 0) file.fail("the number of labels", "is 0 in a model of labels", begin + 8);
  const entries = new Map(); // of several equal entries, the last; labels are behind the words
  for (let number = 0; number < size; number++) {
    const end = bytes.indexOf(0, file.at);
    if (end < 0 || end + ENTRY > bytes.length) file.fail(`entry ${number} of the dictionary`, "has no end");
    const type = bytes[end + 9];
    if (type !== (number < numWords ? 0 : 1)) {
      const expected = number < numWords ? "0, a word" : "1, a label";
      file.fail(`the type of entry ${number} of the dictionary`, `is ${type}, expected ${expected}`, end + 9);
    }
    entries.set(key(bytes.subarray(file.at, end)), number);
    file.at = end + ENTRY;
  }
  const hasNgrams = maxn > 0 || (supervised && wordNgrams > 1);
  let kept = null, ngramRows = bucket;
  if (numKept >= 0) {
    kept = new Map();
    const start = file.take("the kept n-grams", 8 * numKept);
    for (let at = start; at < file.at; at += 8) {
      const number = file.view.getInt32(at, true), row = file.view.getInt32(at + 4, true);
      if (number < 0 || number >= bucket) file.fail("the kept n-grams", `have numbers outside [0, ${bucket})`, start);
      if (row < 0) file.fail("the kept n-grams", `have a row ${row}`, start);
      kept.set(number, row); // of a number's rows, the last
    }
    ngramRows = 0;
    for (const row of kept.values()) ngramRows = Math.max(ngramRows, row + 1);
  }
  if (hasNgrams && bucket === 0) throw new BadText(`${name}: broken fastText model: bucket is 0, but there are n-grams`);
  const numRows = numWords + (hasNgrams ? ngramRows : 0);
  return { supervised, wordNgrams, bucket, minn, maxn, entries, numWords, numRows, kept };
}

// FNV-1a's state after more bytes. fastText's bytes have a sign: from 0x80 on, they flip the upper bits too.
function fold(state, bytes, begin, end) {
  for (let k = begin; k < end; k++) state = Math.imul(state ^ ((bytes[k] << 24) >> 24), PRIME);
  return state;
}

const isSpace = (byte) => byte === 32 || (byte >= 9 && byte <= 13);

function split(bytes) {
  const words = [];
  for (let at = 0; at < bytes.length; at++) {
    if (isSpace(bytes[at])) continue;
    const begin = at;
    while (at < bytes.length && !isSpace(bytes[at])) at++;
    words.push(bytes.subarray(begin, at));
  }
  return words;
}

export class FastTextWords {
  static kind = "fasttext";

  static async load(name, settings, content) {
    if (Object.keys(settings).length) throw new BadText(`${name}: the model's metadata has more for fastText's words, expected nothing`);
    return new FastTextWords(readHead(name, content));
  }

  constructor(head) {
    this.head = head;
  }

  get inputs() {
    return [["ids", "offsets", this.head.supervised ? "k" : "word_offsets"]];
  }

  // The ids of texts, as the inputs of a model: a list of each text's ids, or of each word's and how many words a text has.
  feeds(texts) {
    const ids = [], offsets = [], wordOffsets = [];
    for (const text of texts) {
      const bytes = this.line(text);
      if (this.head.supervised) {
        offsets.push(ids.length);
        for (const id of this.rowsOfText(bytes)) ids.push(id);
        continue;
      }
      offsets.push(wordOffsets.length);
      for (const word of split(bytes)) {
        wordOffsets.push(ids.length);
        for (const id of this.rowsOfWord(word)) ids.push(id);
      }
    }
    const bags = { ids: [ids, [ids.length]], offsets: [offsets, [offsets.length]] };
    return this.head.supervised ? bags : { ...bags, word_offsets: [wordOffsets, [wordOffsets.length]] };
  }

  ids(text) {
    return this.feeds([text]).ids[0];
  }

  line(text) {
    if (text.includes("\n")) throw new BadText("The text has a line feed, and fastText's are single lines.");
    return new TextEncoder().encode(wellFormed(text));
  }

  // As predict has them: up to </s>, without labels, with word n-grams behind.
  rowsOfText(bytes) {
    const words = split(bytes.map((byte) => (byte === 0 ? 32 : byte)));
    const end = words.findIndex((word) => key(word) === END_KEY);
    const { entries, numWords, wordNgrams } = this.head;
    const rows = [], hashes = [];
    for (const word of [...(end < 0 ? words : words.slice(0, end)), END]) {
      const name = key(word), entry = entries.get(name);
      if (entry === undefined ? name.startsWith(LABEL_KEY) : entry >= numWords) continue;
      for (const row of this.rowsOfWord(word)) rows.push(row);
      if (wordNgrams > 1) hashes.push(BigInt(fold(FIRST, word, 0, word.length) | 0)); // with a sign, too
    }
    for (let first = 0; first < hashes.length; first++) {
      let state = hashes[first];
      for (let next = first + 1; next < Math.min(first + wordNgrams, hashes.length); next++) {
        state = BigInt.asUintN(64, state * NGRAM_FACTOR + hashes[next]);
        this.push(rows, Number(state % BigInt(this.head.bucket)));
      }
    }
    return rows;
  }

  // A word's own row, if it has one, and those of its pieces.
  rowsOfWord(word) {
    const { entries, numRows, maxn, minn, bucket } = this.head;
    const name = key(word), entry = entries.get(name);
    const rows = entry !== undefined && entry < numRows ? [entry] : [];
    if (maxn < 1 || name === END_KEY) return rows;
    const bytes = new Uint8Array(word.length + 2);
    bytes[0] = 60; // <
    bytes.set(word, 1);
    bytes[word.length + 1] = 62; // >
    const begins = []; // of characters, and the end
    for (let k = 0; k < bytes.length; k++) if ((bytes[k] & 0xc0) !== 0x80) begins.push(k);
    const count = begins.length;
    begins.push(bytes.length);
    for (let first = 0; first < count; first++) {
      let state = FIRST;
      for (let n = 1; n <= maxn && first + n <= count; n++) {
        state = fold(state, bytes, begins[first + n - 1], begins[first + n]);
        const alone = n === 1 && (first === 0 || first === count - 1); // < or >
        if (n >= minn && !alone) this.push(rows, (state >>> 0) % bucket);
      }
    }
    return rows;
  }

  // Adds the row of an n-gram's number, unless it was pruned.
  push(rows, number) {
    const { kept, numWords } = this.head;
    const row = kept === null ? number : kept.get(number);
    if (row !== undefined) rows.push(numWords + row);
  }
}
