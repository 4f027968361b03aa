// A worker of `lucid-onnx parity`: frames on stdin and stdout.
//   node worker.mjs node
//   node worker.mjs wasm-1|wasm-4|webgpu CHROMIUM

import { createRequire } from "node:module";

import { Runner, Unsupported } from "./runner.mjs";
import { frames, send } from "./wire.mjs";

const require = createRequire(import.meta.url);
const [kind, browser] = process.argv.slice(2);

async function inNode() {
  const ort = require("onnxruntime-node");
  const runner = new Runner(ort, { executionProviders: ["cpu"] });
  return {
    version: `${require("onnxruntime-node/package.json").version}, Node ${process.versions.node}`,
    load: (model) => runner.load(model),
    run: (...args) => runner.run(...args),
    close: () => {},
  };
}

async function inBrowser() {
  const { open } = await import("./browser.mjs");
  return open(kind, browser);
}

console.log = console.error; // stdout is for frames

let runtime = null;
let missing = null;
try {
  runtime = await (kind === "node" ? inNode() : inBrowser());
} catch (error) {
  missing = String(error.message ?? error).split("\n")[0];
}

for await (const { header, blobs } of frames(process.stdin)) {
  let answer = {};
  let results = [];
  try {
    if (header.do === "hello") {
      answer = { missing, version: runtime && runtime.version };
    } else if (header.do === "load") {
      const begin = performance.now();
      await runtime.load(blobs[0]);
      answer = { seconds: (performance.now() - begin) / 1000 };
    } else {
      const done = await runtime.run(header.inputs, blobs, header.runs, header.seconds);
      const plain = (outputs) => outputs.map(({ name, dtype, shape }) => ({ name, dtype, shape }));
      answer = { runs: done.runs, differing: done.differing, seconds: done.seconds, outputs: plain(done.first) };
      results = done.first.map((output) => output.bytes);
      if (done.other) {
        answer.other = plain(done.other);
        results.push(...done.other.map((output) => output.bytes));
      }
    }
  } catch (error) {
    if (error.fatal) {
      // The page died with the runtime in it: to the comparison that is a process that died.
      console.error(error.message);
      process.exit(70);
    }
    answer = { error: String(error.message ?? error), unsupported: error instanceof Unsupported || error.unsupported === true };
  }
  send(1, answer, results);
}
await runtime?.close();
