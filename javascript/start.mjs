// The page to try a model: npm start [-- PORT]

import fs from "node:fs";

import { serve } from "./server.mjs";

const given = process.argv[2] ?? "8000";
const port = /^\d+$/.test(given) ? Number(given) : NaN;
if (!(port <= 65535)) {
  console.error(`port = ${given} is not an integer in [0, 65535]`);
  process.exit(2);
}
if (!fs.existsSync(new URL("node_modules/onnxruntime-web/dist", import.meta.url))) {
  console.error("the packages of this folder are not installed: npm ci --ignore-scripts");
  process.exit(1);
}
try {
  const server = await serve(port);
  console.log(`http://127.0.0.1:${server.address().port}/`);
} catch (error) {
  const why = error.code === "EADDRINUSE" ? "is taken; name another: npm start -- PORT" : `cannot be used: ${error.message}`;
  console.error(`port ${port} ${why}`);
  process.exit(1);
}
