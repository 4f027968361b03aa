// The page to try a model: npm start [-- [PORT] [MODEL]]
// With a model's path, the page that the printed address opens has the model, and the files beside it that it names.

import fs from "node:fs";
import path from "node:path";

import { filesOf } from "./files.mjs";
import { serve } from "./server.mjs";

// npm starts this in its own folder.
const FROM = process.env.INIT_CWD ?? process.cwd();

function stop(code, why) {
  console.error(why);
  process.exit(code);
}

let port = 8000, model = null;
for (const given of process.argv.slice(2)) {
  if (/^-?\d+$/.test(given)) port = Number(given);
  else if (model === null) model = path.resolve(FROM, given);
  else stop(2, `${given}: one model at a time`);
}
if (!(port >= 0 && port <= 65535)) stop(2, `port = ${port} is not an integer in [0, 65535]`);
if (!fs.existsSync(new URL("node_modules/onnxruntime-web/dist", import.meta.url))) {
  stop(1, "the packages of this folder are not installed: npm ci --ignore-scripts");
}
let files = [];
try {
  if (model !== null) files = filesOf(model).paths;
} catch (error) {
  stop(1, error.message);
}
try {
  const server = await serve(port, null, files);
  console.log(`http://127.0.0.1:${server.address().port}/${model === null ? "" : `#${server.token}`}`);
} catch (error) {
  const why = error.code === "EADDRINUSE" ? "is taken; name another: npm start -- PORT" : `cannot be used: ${error.message}`;
  stop(1, `port ${port} ${why}`);
}
