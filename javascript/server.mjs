// The files of the page over HTTP, with the headers that threads in WebAssembly need.

import fs from "node:fs";
import http from "node:http";
import path from "node:path";
import { fileURLToPath } from "node:url";

const FOLDER = path.dirname(fileURLToPath(import.meta.url));
const WEB = path.join(FOLDER, "node_modules", "onnxruntime-web", "dist");
// The example of the page, the one file from outside of this folder.
const EXAMPLE = path.join(FOLDER, "..", "models", "examples", "two_tower.onnx");
const TYPES = { ".html": "text/html; charset=utf-8", ".css": "text/css", ".mjs": "text/javascript", ".wasm": "application/wasm" };

const PAGES = new Set(["index.html", "worker.html", "page.css", "page.mjs", "model.mjs", "values.mjs", "runner.mjs"]);

// The pages, their modules, the example, and onnxruntime-web under /ort/; nothing else.
function fileOf(url) {
  const name = decodeURIComponent(new URL(url, "http://localhost").pathname);
  if (name === "/") return path.join(FOLDER, "index.html");
  if (PAGES.has(name.slice(1))) return path.join(FOLDER, name.slice(1));
  if (name === "/two_tower.onnx") return EXAMPLE;
  const found = /^\/ort\/([\w.-]+\.(?:mjs|wasm))$/.exec(name);
  return found ? path.join(WEB, found[1]) : null;
}

// Begins to listen on 127.0.0.1; port 0 is any. `posted` receives the body of a POST and returns the answer's.
export function serve(port, posted = null) {
  const server = http.createServer(async (request, response) => {
    response.setHeader("Cross-Origin-Opener-Policy", "same-origin");
    response.setHeader("Cross-Origin-Embedder-Policy", "require-corp");
    response.setHeader("Cache-Control", "no-store");
    if (posted && request.method !== "GET") return posted(request, response);
    let file = null;
    try {
      file = fileOf(request.url);
    } catch {
      // a URL that cannot be decoded names no file
    }
    if (file === null || !fs.existsSync(file)) {
      response.statusCode = 404;
      return response.end("no such file\n");
    }
    response.setHeader("Content-Type", TYPES[path.extname(file)] ?? "application/octet-stream");
    fs.createReadStream(file).pipe(response);
  });
  return new Promise((resolve, reject) => {
    server.once("error", reject);
    server.listen(port, "127.0.0.1", () => resolve(server));
  });
}
