// Texts as rows of a list of words, as lucid_onnx/sources/words.py has them.

import { BadText } from "./values.mjs";

// What Python splits at; JavaScript's \s differs from it.
const SPACE = /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/u;
const AROUND = /^[!-/:-@[-`{-~]+|[!-/:-@[-`{-~]+$/gu;

export class Words {
  static kind = "words";

  static async load(name, settings, content) {
    if (Object.keys(settings).length) throw new BadText(`${name}: the model's metadata has more for a list of words, expected nothing`);
    return new Words(new TextDecoder("utf-8", { ignoreBOM: true }).decode(content).split("\n"));
  }

  constructor(words) {
    this.rows = new Map();
    words.forEach((word, row) => {
      if (word !== "" && !this.rows.has(word)) this.rows.set(word, row); // of equal words, the first
    });
  }

  // A piece as it is, then without the punctuation around it, then that in lower case; what is not found is left out.
  ids(text) {
    const found = [];
    for (const piece of text.split(SPACE)) {
      const bare = piece.replace(AROUND, "");
      const row = this.rows.get(piece) ?? this.rows.get(bare) ?? this.rows.get(bare.toLowerCase());
      if (row !== undefined) found.push(row);
    }
    return found;
  }
}
