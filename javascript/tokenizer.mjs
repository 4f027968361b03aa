// Texts as tokens of a tokenizer.json, by the package @huggingface/tokenizers.
//
// It gives other ids than the Python package for some tokenizers (Unigram, WordLevel, ByteLevel), without a sign of it. So
// what was not compared id by id is rejected; tests/test_javascript_texts.py compares the others.

import { BadText, wellFormed } from "./values.mjs";

// What gives the ids of Python, by part of a tokenizer.json.
const MODELS = ["BPE", "WordPiece"];
const NORMALIZERS = ["BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Prepend", "Replace"];
const PRE_TOKENIZERS = ["BertPreTokenizer", "Metaspace"];
// Settings of models, and the one value of each that was compared.
const SETTINGS = { dropout: null, end_of_word_suffix: null, continuing_subword_prefix: null, ignore_merges: false };
const PIECES = { continuing_subword_prefix: "##", max_input_chars_per_word: 100 };

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

// The parts of a normalizer or pre-tokenizer, which may be a sequence of others.
function parts(found, list) {
  if (found == null) return [];
  return found.type === "Sequence" && Array.isArray(found[list]) ? found[list].flatMap((part) => parts(part, list)) : [found];
}

// Whether it makes capital letters small.
const lowers = ({ normalizer }) => parts(normalizer, "normalizers").some((part) => part?.type === "BertNormalizer" && part.lowercase !== false);

// What of a tokenizer JavaScript does not do as Python does, in words; null if there is nothing.
function unknown(description) {
  const { model } = description;
  const type = model.type ?? "";
  if (!MODELS.includes(type)) return type ? `its model is ${type}` : "its model has no type";
  for (const [name, value] of Object.entries(type === "BPE" ? SETTINGS : PIECES)) {
    if ((model[name] ?? SETTINGS[name] ?? value) !== value && model[name] !== "") return `its ${name} is ${JSON.stringify(model[name])}`;
  }
  for (const part of parts(description.normalizer, "normalizers")) {
    if (!NORMALIZERS.includes(part?.type)) return `its normalizer is ${part?.type}`;
    if (part.type === "Replace" && typeof part.pattern?.String !== "string") return "its normalizer replaces a regular expression";
  }
  if (lowers(description) && parts(description.normalizer, "normalizers").length > 1) return "its normalizer is more than a BertNormalizer";
  for (const part of parts(description.pre_tokenizer, "pretokenizers")) {
    if (!PRE_TOKENIZERS.includes(part?.type)) return `its pre-tokenizer is ${part?.type}`;
  }
  return null;
}

export class Tokenizer {
  static kind = "tokenizer";

  // `load` gives the package.
  static async load(name, { max_characters: cut = null, prefix = "", ...more }, content, load) {
    if (!(cut === null || (Number.isInteger(cut) && cut >= 0)) || typeof prefix !== "string" || Object.keys(more).length) {
      throw new BadText(`${name}: the model's metadata has settings that no tokenizer has`);
    }
    let description;
    try {
      description = JSON.parse(new TextDecoder().decode(content));
    } catch (error) {
      throw new BadText(`${name}: is not JSON: ${error.message}`);
    }
    if (!isObject(description) || !isObject(description.model)) throw new BadText(`${name}: is not a tokenizer: it has no model`);
    const why = unknown(description);
    if (why !== null) {
      throw new BadText(`${name}: ${why}, and ids in JavaScript may differ from Python's there. ` +
        "Encode its texts in Python, with lucid_onnx.TextEncoder.");
    }
    const truncation = description.truncation ?? null;
    if (truncation !== null && !(Number.isInteger(truncation.max_length) && truncation.max_length >= 0)) {
      throw new BadText(`${name}: its truncation has no max_length`);
    }
    let package_;
    try {
      package_ = await load();
    } catch {
      throw new BadText(`${name}: the package @huggingface/tokenizers is not installed: npm ci --ignore-scripts`);
    }
    try {
      const tokenizer = new package_.Tokenizer(description, {});
      return new Tokenizer(name, tokenizer, { truncation, cut, prefix, lowers: lowers(description) });
    } catch (error) {
      throw new BadText(`${name}: @huggingface/tokenizers cannot read it: ${error.message}`);
    }
  }

  constructor(name, tokenizer, settings) {
    Object.assign(this, { name, tokenizer, ...settings });
  }

  ids(text) {
    let given = wellFormed(this.prefix + text);
    if (this.cut !== null) given = [...given].slice(0, this.cut).join("");
    // Rust has one small sigma for the capital one, JavaScript another one at the end of a word.
    if (this.lowers) given = given.replaceAll("Σ", "σ");
    let { ids } = this.tokenizer.encode(given, { add_special_tokens: false });
    if (!ids.every(Number.isInteger)) throw new BadText(`${this.name}: a token of the text has no id.`);
    if (this.truncation !== null && ids.length > this.truncation.max_length) {
      const { max_length: most, direction } = this.truncation;
      ids = direction === "Left" ? ids.slice(ids.length - most) : ids.slice(0, most);
    }
    return ids;
  }
}
