// The page: a model is chosen, its inputs are made up or typed in, and its outputs are shown.

import { described, openText } from "./encoder.mjs";
import { read } from "./model.mjs";
import { ARRAYS, Runner } from "./runner.mjs";
import * as texts from "./texts.mjs";
import { BadText, broken, madeUp, parse, shapeText } from "./values.mjs";

const MOST_ROWS = 20, MOST_COLUMNS = 12;
const MOST_RUNS = 20, MOST_SECONDS = 0.25;
const BUNDLES = { wasm: "/ort/ort.wasm.bundle.min.mjs", webgpu: "/ort/ort.webgpu.bundle.min.mjs" };
// What a module of WebAssembly says when it has crashed.
const DEAD = /Aborted\(|memory access out of bounds|unreachable|table index is out of bounds|device (?:was )?lost/i;
// What the runtime says, in plain words; its own words are shown below them.
const PLAIN = [
  [DEAD, "The runtime crashed. Reload the page to continue."],
  [/ai\.lucid:\w+\(-1\) is not a registered/,
    "This model is in the native form, whose operator browsers do not have. Write it with form=\"portable\"."],
  [/is not a registered function\/op/, "This model has an operator that the runtime does not know."],
  [/protobuf parsing failed|ModelProto does not have a graph|No graph was found/i,
    "This file is not an ONNX model, or only a part of one."],
  [/Provider type for \w+ node/,
    "On WebGPU this runtime does not load the portable form: choose WASM, or write the model with form=\"standard\"."],
  [/unsupported data type/, "An input or output has a type that the runtime does not support in a browser, bfloat16 perhaps."],
  [/external data/i, "The model's external data could not be read."],
];
// Inputs that show what a bag is: rows in several bags, an empty bag, a padded position. server.mjs serves the file.
const EXAMPLE = {
  name: "two_tower.onnx",
  story: "Three users, each the mean of a bag of clicked items, are scored against three items, each the weighted sum of a bag " +
    "of words. Scores have a row per user and a column per item. User 1 clicked nothing: an empty bag pools to zeros. Word 0 is " +
    "padding and adds nothing.",
  inputs: {
    history: "3, 17, 17, 42, 8, 30, 8",
    history_offsets: "0, 4, 4",
    words: "12, 77, 5, 0, 150, 12, 199, 64, 31",
    word_offsets: "0, 4, 6",
    word_weights: "1, 0.5, 2, 1, 1, 0.25, 1.5, 1, 1",
  },
};

const at = (id) => document.getElementById(id);
const element = (name, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};

const BUTTONS = document.querySelectorAll("button[type=submit]");
const runtimes = {};
let chosen = null; // {name, bytes, facts, others, text, note}
let loaded = null; // the runner that holds it

async function letGo() {
  const old = loaded;
  loaded = null;
  await old?.session.release();
}

async function runnerOf(backend, externalData) {
  const ort = (runtimes[backend] ??= await import(BUNDLES[backend]));
  ort.env.logLevel = "fatal";
  ort.env.wasm.numThreads = crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  ort.env.wasm.wasmPaths = "/ort/";
  return new Runner(ort, { executionProviders: [backend], externalData });
}

function showError(plain, detail = "") {
  at("error").replaceChildren(element("p", { textContent: plain }));
  if (detail) at("error").append(element("code", { textContent: detail }));
  at("error").hidden = false;
  at("status").textContent = "";
}

function explain(what, error) {
  if (error instanceof BadText) return showError(error.message);
  const detail = String(error?.message ?? error);
  const plain = PLAIN.find(([pattern]) => pattern.test(detail))?.[1] ?? error?.why ?? "";
  showError(`${what} ${plain}`.trim(), detail);
}

// One thing at a time: the runtime makes no two sessions at once.
let queue = Promise.resolve();
function next(status, failure, work) {
  queue = queue.then(async () => {
    at("error").hidden = true;
    at("status").textContent = status;
    for (const button of BUTTONS) button.disabled = true;
    await new Promise((resolve) => setTimeout(resolve)); // the page is drawn before the runtime holds it up
    try {
      await work();
      at("status").textContent = "";
    } catch (error) {
      explain(failure, error);
    }
    for (const button of BUTTONS) button.disabled = loaded === null;
  });
}

async function choose(files) {
  chosen = null;
  for (const id of ["inputs", "result", "about", "story"]) at(id).hidden = true;
  texts.forget();
  at("fields").replaceChildren();
  await letGo();
  const models = files.filter((file) => /\.onnx$/i.test(file.name));
  const [model] = models.length || files.length > 1 ? models : files;
  if (model === undefined) throw new BadText(`There is no .onnx file among ${files.map((file) => file.name).join(", ")}.`);
  if (models.length > 1) throw new BadText(`Choose one model at a time, not ${models.map((file) => file.name).join(" and ")}.`);
  const bytes = new Uint8Array(await model.arrayBuffer());
  let facts = { bags: [], roles: Object.create(null), rows: null, files: [], text: null };
  try {
    facts = read(bytes);
  } catch {
    // The runtime says what is wrong with the file; facts only help to make inputs up.
  }
  const others = [];
  for (const path of facts.files) {
    const found = files.find((file) => file.name === path.split("/").pop());
    if (!found) throw new BadText(`${model.name} keeps tables in ${path}: choose both files together.`);
    others.push({ path, data: new Uint8Array(await found.arrayBuffer()) });
  }
  chosen = { name: model.name, bytes, facts, others, ...(await textOf(model.name, facts, files)) };
  await load();
}

// What encodes a model's texts: {text, note}, of which one is null. A model whose file for it was not chosen takes ids.
async function textOf(model, { text: found }, files) {
  if (found === null) return { text: null, note: "" };
  const entry = described(model, found);
  const file = files.find(({ name }) => name === entry.file);
  if (!file) return { text: null, note: ` It takes texts where ${entry.file} is chosen together with it.` };
  const content = new Uint8Array(await file.arrayBuffer());
  return { text: await openText(model, entry, content, () => import("/tokenizers.mjs")), note: "" };
}

// What stands in the fields stays where the same model goes to another backend.
async function load() {
  at("result").hidden = true;
  texts.forget();
  await letGo();
  const { name, bytes, facts, others, text } = chosen;
  const runner = await runnerOf(at("backend").value, others);
  const begin = performance.now();
  await runner.load(bytes);
  loaded = runner;
  describe(facts, performance.now() - begin);
  if (text !== null) return texts.show(name, runner, text);
  at("inputs").hidden = false;
  if (at("fields").childElementCount > 0) return;
  const values = madeUp(runner.session.inputMetadata, facts);
  at("fields").replaceChildren(...runner.session.inputMetadata.map((meta, k) => {
    const type = meta.isTensor ? `${meta.type} ${meta.shape.length ? shapeText(meta.shape) : ""}` : "not a tensor";
    const value = values[meta.name];
    const rows = Math.min(8, Math.max(meta.isTensor && meta.shape.length > 1 ? 3 : 2, value.split("\n").length));
    const field = element("textarea", { id: `input-${k}`, name: meta.name, value, rows, spellcheck: false, autocomplete: "off" });
    const about = element("small", { id: `about-${k}`, textContent: type });
    field.setAttribute("aria-describedby", about.id);
    return element("div", { className: "field" }, element("label", { htmlFor: field.id, textContent: meta.name }), " ", about, field);
  }));
}

function describe({ bags }, milliseconds) {
  const told = bags.slice(0, 3).map(({ op, mode, table, padding }) => {
    const of = table ? `over a table of ${table.map((n) => n.toLocaleString("en")).join(" × ")}` : "over a table that is an input";
    return `${op} (${mode}) ${of}${padding === null ? "" : `, row ${padding} is padding`}`;
  });
  if (bags.length > 3) told.push(`${bags.length - 3} more bags`);
  const what = told.length ? `${told.join("; ")}. ` : "";
  at("about").textContent = `${chosen.name}: ${what}Loaded in ${timeText(milliseconds)}.${chosen.note}`;
  at("about").hidden = false;
}

const timeText = (ms) => (ms < 1000 ? `${Number(ms.toPrecision(3))} ms` : `${Number((ms / 1000).toPrecision(3))} s`);

async function run() {
  at("result").hidden = true;
  const inputs = loaded.session.inputMetadata.map((meta, k) => {
    const field = at(`input-${k}`);
    field.removeAttribute("aria-invalid");
    try {
      return parse(field.value, meta);
    } catch (error) {
      field.setAttribute("aria-invalid", "true");
      field.focus();
      throw error;
    }
  });
  let done;
  try {
    done = await loaded.run(inputs, inputs.map((input) => input.bytes), MOST_RUNS, MOST_SECONDS);
  } catch (error) {
    throw Object.assign(new Error(String(error?.message ?? error)), { why: broken(inputs, chosen.facts) });
  }
  const where = { wasm: "WASM", webgpu: "WebGPU" }[loaded.options.executionProviders[0]];
  const count = loaded.ort.env.wasm.numThreads;
  const threads = where === "WASM" ? `, ${count} ${count === 1 ? "thread" : "threads"}` : "";
  const bits = done.differing ? `; ${done.differing} of them differed from the first` : "";
  const bag = chosen.facts.bags.length > 0 || loaded.session.outputMetadata.some(ofBags);
  const why = bag ? broken(inputs, chosen.facts) : null;
  at("warning").textContent = why === null ? "" : `${why} This backend did not reject it: the numbers mean nothing.`;
  at("warning").hidden = why === null;
  at("timing").textContent =
    `${timeText(1000 * done.seconds)} a run, the median of ${done.runs}${bits}. ` +
    `${where}${threads}, onnxruntime-web ${loaded.ort.env.versions.web}.`;
  at("outputs").replaceChildren(...done.first.map((output, k) => table(output, loaded.session.outputMetadata[k])));
  at("result").hidden = false;
}

// As lucid_onnx.build_model writes it.
const ofBags = (meta) => meta.isTensor && meta.shape[0] === "num_bags";

const numberText = (value) => String(Number.isFinite(value) ? Number(value.toPrecision(7)) : value);

// An output as rows of its last axis.
function table({ name, dtype, shape, bytes }, meta) {
  const [Type, kind] = ARRAYS[dtype];
  if (kind === "float16" && !globalThis.Float16Array) throw new BadText(`${name}: this browser has no numbers of float16`);
  const values = new Type(bytes.buffer);
  const width = shape.at(-1) ?? 1;
  const height = shape.slice(0, -1).reduce((a, b) => a * b, 1);
  const rows = Math.min(height, MOST_ROWS), columns = Math.min(width, MOST_COLUMNS);
  const rowName = (k) => {
    if (shape.length < 2) return name;
    const place = [];
    for (const size of shape.slice(0, -1).reverse()) {
      place.unshift(k % size);
      k = Math.floor(k / size);
    }
    return (ofBags(meta) ? "bag " : "") + place.join(", ");
  };
  const head = element("tr", {}, element("td", { textContent: "" }));
  for (let c = 0; c < columns; c++) head.append(element("th", { scope: "col", textContent: c }));
  const body = element("tbody");
  for (let r = 0; r < rows; r++) {
    const row = element("tr", {}, element("th", { scope: "row", textContent: rowName(r) }));
    for (let c = 0; c < columns; c++) row.append(element("td", { textContent: numberText(values[r * width + c]) }));
    body.append(row);
  }
  const caption = element("figcaption", {}, element("strong", { textContent: name }), " ",
    element("small", { textContent: `${dtype} [${shape.join(", ")}]` }));
  const cut = element("p", { className: "cut", textContent: cutText(rows, height, columns, width) });
  cut.hidden = cut.textContent === "";
  const box = element("div", { className: "scroll", tabIndex: 0 }, element("table", {}, element("thead", {}, head), body));
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", name);
  const sideways = element("p", { className: "hint", textContent: "Scroll the table sideways to see all of these columns." });
  new ResizeObserver(() => (sideways.hidden = box.scrollWidth <= box.clientWidth)).observe(box);
  return element("figure", { className: "numbers" }, caption, cut, box, sideways);
}

// Which part of an output is shown; "" if all of it is.
function cutText(rows, height, columns, width) {
  const parts = [];
  if (rows < height) parts.push(`the first ${rows} of ${height.toLocaleString("en")} rows`);
  if (columns < width) parts.push(`the first ${columns} of ${width.toLocaleString("en")} columns`);
  return parts.length ? `Showing ${parts.join(" and ")}.` : "";
}

function take(files) {
  if (files.length === 0) return;
  const name = files.find((file) => /\.onnx$/i.test(file.name))?.name ?? files[0].name;
  next(`Loading ${name} …`, `${name} could not be loaded.`, () => choose(files));
}

async function example() {
  const answer = await fetch(EXAMPLE.name);
  if (!answer.ok) throw new BadText(`${EXAMPLE.name} is not in models/examples of this copy of lucid-onnx.`);
  at("file").value = "";
  at("backend").value = "wasm"; // WebGPU does not load the portable form, which this file is in
  await choose([new File([await answer.arrayBuffer()], EXAMPLE.name)]);
  loaded.session.inputMetadata.forEach(({ name }, k) => (at(`input-${k}`).value = EXAMPLE.inputs[name]));
  at("story").textContent = `${EXAMPLE.story} Change a number and press Run.`;
  at("story").hidden = false;
  await run();
}

at("example").addEventListener("click", () => next("Loading the example …", "The example could not be run.", example));
at("file").addEventListener("change", () => take([...at("file").files]));
// Without this, choosing a file again that was written anew would be no change.
at("file").addEventListener("click", () => (at("file").value = ""));
at("backend").addEventListener("change", () => {
  if (chosen) next(`Loading ${chosen.name} …`, `${chosen.name} could not be loaded.`, load);
});
at("inputs").addEventListener("submit", (event) => {
  event.preventDefault();
  next("Running …", "The model rejected these inputs.", run);
});
for (const [id, work] of [["label", texts.label], ["search", texts.search]]) {
  at(id).addEventListener("submit", (event) => {
    event.preventDefault();
    next("Running …", "The model rejected this text.", work);
  });
}
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) document.body.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  at("file").files = event.dataTransfer.files;
  take([...event.dataTransfer.files]);
});

// What `npm start -- MODEL` was given; the address has the token for it.
async function given(token) {
  const get = async (place) => {
    const answer = await fetch(place, { headers: { "X-Lucid-Token": token } });
    if (!answer.ok) throw new BadText("The server does not know this address. Open the one that npm start printed last.");
    return answer;
  };
  const names = await (await get("/given")).json();
  await choose(await Promise.all(names.map(async (name, k) => new File([await (await get(`/given/${k}`)).arrayBuffer()], name))));
}

if (location.hash.length > 1) next("Loading the model …", "The model could not be loaded.", () => given(location.hash.slice(1)));

if (await navigator.gpu?.requestAdapter()) at("backend").append(element("option", { value: "webgpu", textContent: "WebGPU" }));
