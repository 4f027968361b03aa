// The files of the page over HTTP, for this page alone: other pages of the browser and other names are turned away.

import crypto from "node:crypto";
import { once } from "node:events";
import fs from "node:fs";
import http from "node:http";
import path from "node:path";
import { pipeline } from "node:stream/promises";
import { fileURLToPath } from "node:url";

const FOLDER = path.dirname(fileURLToPath(import.meta.url));
const WEB = path.join(FOLDER, "node_modules", "onnxruntime-web", "dist");
const TOKENIZERS = path.join(FOLDER, "node_modules", "@huggingface", "tokenizers", "dist", "tokenizers.min.mjs");
// The example of the page, the one file from outside of this folder.
const EXAMPLE = path.join(FOLDER, "..", "models", "examples", "two_tower.onnx");
const TYPES = { ".html": "text/html; charset=utf-8", ".css": "text/css", ".mjs": "text/javascript", ".wasm": "application/wasm" };

const HEADERS = {
  // What threads in WebAssembly need.
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  // What keeps other pages out, and this one from reaching anything else.
  "Cross-Origin-Resource-Policy": "same-origin",
  "Content-Security-Policy":
    "default-src 'self'; script-src 'self' 'wasm-unsafe-eval' blob:; worker-src 'self' blob:; " +
    "connect-src 'self' blob: data:; img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
  "X-Content-Type-Options": "nosniff",
  "Referrer-Policy": "no-referrer",
  "Cache-Control": "no-store",
};

const PAGES = new Set([
  "index.html", "worker.html", "page.css", "page.mjs", "model.mjs", "values.mjs", "runner.mjs", "texts.mjs", "encoder.mjs", "fasttext.mjs",
  "words.mjs", "tokenizer.mjs",
]);

// The pages, their modules, the example, onnxruntime-web under /ort/, and the tokenizers; nothing else.
function fileOf(url) {
  let name;
  try {
    name = decodeURIComponent(new URL(url, "http://localhost").pathname);
  } catch {
    return null; // a URL that cannot be decoded names no file
  }
  if (name === "/") return path.join(FOLDER, "index.html");
  if (PAGES.has(name.slice(1))) return path.join(FOLDER, name.slice(1));
  if (name === "/two_tower.onnx") return EXAMPLE;
  if (name === "/tokenizers.mjs") return TOKENIZERS;
  const found = /^\/ort\/([\w.-]+\.(?:mjs|wasm))$/.exec(name);
  return found ? path.join(WEB, found[1]) : null;
}

// What another page of the same browser could reach too. A name that was made to point here has another Host, a request
// from another page another Origin; programs send neither Origin nor Sec-Fetch-Site.
function isOurs(request, port) {
  const hosts = [`127.0.0.1:${port}`, `localhost:${port}`];
  const { host, origin, "sec-fetch-site": site } = request.headers;
  if (!hosts.includes(host)) return false;
  if (origin !== undefined && !hosts.some((h) => origin === `http://${h}`)) return false;
  return site === undefined || site === "same-origin" || site === "none";
}

function hasToken(request, token) {
  const given = Buffer.from(String(request.headers["x-lucid-token"] ?? ""));
  const expected = Buffer.from(token);
  return given.length === expected.length && crypto.timingSafeEqual(given, expected);
}

function fail(response, status, text) {
  response.statusCode = status;
  response.setHeader("Content-Type", "text/plain; charset=utf-8");
  response.end(`${text}\n`);
}

// Sends a file. An error of either stream ends this answer alone.
async function sendFile(file, response) {
  const stream = fs.createReadStream(file);
  try {
    await once(stream, "open");
  } catch {
    return fail(response, 404, "no such file");
  }
  response.setHeader("Content-Type", TYPES[path.extname(file)] ?? "application/octet-stream");
  await pipeline(stream, response).catch(() => response.destroy());
}

// The files that this server was given: their names as JSON under /given, and each one under /given/<its number>.
function sendGiven(url, given, response) {
  const number = /^\/given\/(\d+)$/.exec(url)?.[1];
  if (number in given) return sendFile(given[number], response);
  if (url !== "/given") return fail(response, 404, "no such file");
  response.setHeader("Content-Type", "application/json");
  response.end(JSON.stringify(given.map((file) => path.basename(file))));
}

// Listens on 127.0.0.1; port 0 is any free one. `exchange` answers the requests that are not GET, and `given` are paths of files that
// the page may fetch. Both need the token, which stands in `server.token` and travels in the header X-Lucid-Token.
export function serve(port, exchange = null, given = []) {
  const token = crypto.randomBytes(24).toString("hex");
  const server = http.createServer(async (request, response) => {
    for (const [name, value] of Object.entries(HEADERS)) response.setHeader(name, value);
    response.on("error", () => {}); // the client went away in the middle of an answer
    try {
      if (!isOurs(request, server.address().port)) return fail(response, 403, "not a page of this server");
      if (request.method === "GET" || request.method === "HEAD") {
        if (/^\/given(?:\/|$)/.test(request.url)) {
          if (!hasToken(request, token)) return fail(response, 403, "the token is missing or wrong");
          return await sendGiven(request.url, given, response);
        }
        const file = fileOf(request.url);
        return await (file === null ? fail(response, 404, "no such file") : sendFile(file, response));
      }
      if (exchange === null) return fail(response, 405, "only GET");
      if (!hasToken(request, token)) return fail(response, 403, "the token is missing or wrong");
      await exchange(request, response);
    } catch (error) {
      if (response.headersSent) response.destroy();
      else fail(response, 500, String(error.message ?? error));
    }
  });
  server.on("clientError", (_, socket) => socket.destroy());
  server.token = token;
  return new Promise((resolve, reject) => {
    server.once("error", reject);
    server.listen(port, "127.0.0.1", () => resolve(server));
  });
}
