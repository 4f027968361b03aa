// The part of the page for models of texts: what a classifier says of one, or the search among several by their vectors.

import { Encoder } from "./encoder.mjs";
import { BadText } from "./values.mjs";

const MOST_LABELS = 5, MOST_HITS = 10;
const PREFIX = "__label__"; // of fastText's labels

const at = (id) => document.getElementById(id);

let encoder = null;

export function forget() {
  encoder = null;
  for (const id of ["label", "search", "found"]) at(id).hidden = true;
}

// Shows the form for a model that is loaded.
export function show(model, runner, text) {
  forget();
  encoder = new Encoder(model, runner.ort, runner.session, text);
  at(encoder.hasLabels ? "label" : "search").hidden = false;
}

// A row of the result: a bar of a length in [0, 1] below a text and its number.
function row(text, number) {
  const made = document.createElement("li");
  const [name, value, bar] = ["span", "b", "meter"].map((tag) => document.createElement(tag));
  name.textContent = text;
  value.textContent = number.toFixed(4);
  bar.value = Math.min(1, Math.max(0, number));
  bar.textContent = value.textContent;
  bar.setAttribute("aria-hidden", "true"); // the number says it
  made.append(name, " ", value, bar);
  return made;
}

function result(title, rows, note) {
  at("found-title").textContent = title;
  at("rows").replaceChildren(...rows);
  at("note").textContent = note;
  at("found").hidden = false;
}

export async function label() {
  at("found").hidden = true;
  // fastText's texts are single lines.
  const found = await encoder.predict(at("text").value.replace(/\s*\n\s*/g, " "), MOST_LABELS);
  if (found.length === 0) throw new BadText("The model has no label for this text: it knows none of its words.");
  const rows = found.map(([name, probability]) => row(name.startsWith(PREFIX) ? name.slice(PREFIX.length) : name, probability));
  result("Labels", rows, "The most probable labels of the text, with their probabilities.");
}

export async function search() {
  at("found").hidden = true;
  const lines = at("lines").value.split("\n").map((line) => line.trim()).filter(Boolean);
  const query = at("query").value.trim();
  if (lines.length === 0) throw new BadText("There is no text to search in.");
  if (query === "") throw new BadText("There is no query.");
  const hits = await encoder.search(query, lines);
  const left = lines.length - hits.length;
  const unknown = left === 0 ? "" : ` ${left} ${left === 1 ? "line is" : "lines are"} left out: the model knows no word of ${left === 1 ? "it" : "them"}.`;
  const best = Math.min(MOST_HITS, hits.length);
  const of = best < lines.length ? `The best ${best} of ${lines.length} lines` : "The lines";
  result("Hits", hits.slice(0, MOST_HITS).map(([number, cosine]) => row(lines[number], cosine)),
    `${of}, by the cosine between their vectors and the query's.${unknown}`);
}
