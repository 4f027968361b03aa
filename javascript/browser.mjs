// onnxruntime-web in headless Chromium. Bytes go to the page over fetch from the server that the page came from,
// results come back by POST: frames would be several times their size as strings.

import fs from "node:fs";

import { chromium } from "playwright-core";

import { serve } from "./server.mjs";

// The package exports no package.json to require.
const PACKAGE = new URL("node_modules/onnxruntime-web/package.json", import.meta.url);
// A GPU in software where there is none; a real one is preferred by leaving LUCID_ONNX_WEBGPU_ADAPTER empty.
const ADAPTER = process.env.LUCID_ONNX_WEBGPU_ADAPTER ?? "swiftshader";
// What a module of WebAssembly says when it is beyond use.
const DEAD = /Aborted\(|memory access out of bounds|unreachable|table index is out of bounds|Target (?:page|crashed)|Target closed|device (?:was )?lost/i;

class Dead extends Error {
  fatal = true;
}

export async function open(kind, executablePath) {
  const gpu = kind === "webgpu";
  let outgoing = [];
  let incoming = [];
  const server = await serve(0, async (request, response) => {
    if (request.method === "PUT") { // the page asks for a blob
      const index = Number(new URL(request.url, "http://localhost").pathname.slice(1));
      return response.end(outgoing[index]);
    }
    const chunks = [];
    for await (const chunk of request) chunks.push(chunk);
    incoming[Number(new URL(request.url, "http://localhost").pathname.slice(1))] = Buffer.concat(chunks);
    response.end();
  });
  const args = [];
  if (process.getuid?.() === 0) args.push("--no-sandbox"); // Chromium refuses to start as root otherwise
  if (gpu) {
    args.push("--enable-unsafe-webgpu", "--ignore-gpu-blocklist");
    if (ADAPTER) args.push(`--use-webgpu-adapter=${ADAPTER}`);
  }
  let instance;
  const close = async () => {
    await instance?.close();
    server.close();
    server.closeAllConnections();
  };
  try {
    instance = await chromium.launch({ executablePath, args });
    const page = await instance.newPage();
    let crashed = false;
    page.on("crash", () => (crashed = true));
    await page.goto(`http://127.0.0.1:${server.address().port}/worker.html`);
    const where = await page.evaluate(async ({ gpu, threads }) => {
      const ort = await import(gpu ? "/ort/ort.webgpu.bundle.min.mjs" : "/ort/ort.wasm.bundle.min.mjs");
      const { Runner } = await import("/runner.mjs");
      ort.env.logLevel = "fatal";
      ort.env.wasm.numThreads = threads;
      ort.env.wasm.wasmPaths = "/ort/";
      window.lucid = new Runner(ort, { executionProviders: [gpu ? "webgpu" : "wasm"] });
      if (!gpu) return threads > 1 && !crossOriginIsolated ? { missing: "the page has no threads" } : {};
      const adapter = await navigator.gpu?.requestAdapter();
      if (!adapter) return { missing: "Chromium has no WebGPU adapter here" };
      const half = adapter.features.has("shader-f16") ? "" : ", without shader-f16";
      return { adapter: `${adapter.info.vendor} ${adapter.info.architecture}${half}` };
    }, { gpu, threads: kind === "wasm-4" ? 4 : 1 });
    if (where.missing) throw new Error(where.missing);
    const call = async (work) => {
      try {
        const result = await page.evaluate(work.body, work.given);
        if (result.error !== undefined) {
          if (DEAD.test(result.error)) throw new Dead(result.error);
          throw Object.assign(new Error(result.error), { unsupported: result.unsupported });
        }
        return result;
      } catch (error) {
        if (crashed || DEAD.test(String(error.message))) throw new Dead(String(error.message).split("\n")[0]);
        throw error;
      }
    };
    const headers = { "X-Lucid-Token": server.token };
    const load = async (model) => {
      outgoing = [model];
      await call({
        given: { headers },
        body: async ({ headers }) => {
          try {
            const bytes = await (await fetch("/0", { method: "PUT", headers })).arrayBuffer();
            await window.lucid.load(new Uint8Array(bytes));
            return {};
          } catch (error) {
            return { error: String(error?.message ?? error) };
          }
        },
      });
    };
    const run = async (inputs, blobs, runs, seconds) => {
      outgoing = blobs;
      incoming = [];
      const result = await call({
        given: { inputs, runs, seconds, headers },
        body: async ({ inputs, runs, seconds, headers }) => {
          try {
            const blobs = [];
            for (let k = 0; k < inputs.length; k++) {
              blobs.push(new Uint8Array(await (await fetch(`/${k}`, { method: "PUT", headers })).arrayBuffer()));
            }
            const done = await window.lucid.run(inputs, blobs, runs, seconds);
            let sent = 0;
            for (const outputs of [done.first, done.other ?? []]) {
              for (const output of outputs) {
                await fetch(`/${sent++}`, { method: "POST", headers, body: output.bytes });
                delete output.bytes;
              }
            }
            return done;
          } catch (error) {
            return { error: String(error?.message ?? error), unsupported: error?.constructor?.name === "Unsupported" };
          }
        },
      });
      let k = 0;
      for (const outputs of [result.first, result.other ?? []]) {
        for (const output of outputs) output.bytes = incoming[k++];
      }
      return result;
    };
    const version = JSON.parse(fs.readFileSync(PACKAGE, "utf8")).version;
    const at = where.adapter ? ` on ${where.adapter}` : "";
    return { version: `${version}, Chromium ${instance.version()}${at}`, load, run, close };
  } catch (error) {
    await close();
    throw error;
  }
}
