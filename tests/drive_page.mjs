// Works javascript/'s page as a person would: node drive_page.mjs FOLDER CHROMIUM, and on stdin {url, steps}.
// A step is [what, ...]: files PATHS; drop PATHS; fill LABEL TEXT; press NAME; value LABEL; table; error; shot WIDTH SCHEME PATH.
// On stdout a list with an answer for each step, null where there is none.

import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

const [folder, executablePath] = process.argv.slice(2);
const { chromium } = createRequire(path.join(folder, "package.json"))("playwright-core");
const { url, steps } = JSON.parse(fs.readFileSync(0, "utf8"));
const browser = await chromium.launch({ executablePath, args: process.getuid?.() === 0 ? ["--no-sandbox"] : [] });
const page = await browser.newPage();
page.setDefaultTimeout(20000);
const elsewhere = [];
page.on("request", (request) => {
  if (!/^(?:data|blob):/.test(request.url()) && !request.url().startsWith(url)) elsewhere.push(request.url());
});
page.on("pageerror", (error) => elsewhere.push(String(error)));

// Until the page is done with what it was told.
const settled = () => page.waitForFunction(() => document.getElementById("status").textContent === "");
const field = (label) => page.getByLabel(label, { exact: true });

const DO = {
  files: async (paths) => {
    await page.getByLabel("Drop an .onnx file").setInputFiles(paths);
    await settled();
  },
  drop: async (paths) => {
    const files = paths.map((name) => [path.basename(name), [...fs.readFileSync(name)]]);
    const data = await page.evaluateHandle((all) => {
      const transfer = new DataTransfer();
      for (const [name, bytes] of all) transfer.items.add(new File([new Uint8Array(bytes)], name));
      return transfer;
    }, files);
    await page.dispatchEvent("main", "drop", { dataTransfer: data });
    await settled();
  },
  fill: (label, text) => field(label).fill(text),
  value: (label) => field(label).inputValue(),
  press: async (name) => {
    await page.getByRole("button", { name }).click();
    await settled();
  },
  table: async () => {
    if (!(await page.locator("#result").isVisible())) return null;
    const rows = await page.locator("#outputs tbody tr").evaluateAll((all) =>
      all.map((row) => [...row.querySelectorAll("td")].map((cell) => cell.textContent)));
    const warning = (await page.locator("#warning").isVisible()) ? await page.locator("#warning").innerText() : null;
    return { rows, warning, caption: await page.locator("#outputs caption").innerText(), timing: await page.locator("#timing").innerText() };
  },
  error: async () => ((await page.locator("#error").isVisible()) ? page.locator("#error").innerText() : null),
  shot: async (width, scheme, name) => {
    await page.emulateMedia({ colorScheme: scheme });
    await page.setViewportSize({ width, height: 800 });
    await page.screenshot({ path: name, fullPage: true });
    return page.evaluate(() => document.documentElement.scrollWidth);
  },
  elsewhere: () => elsewhere,
};

await page.goto(url, { waitUntil: "load" });
const answers = [];
for (const [what, ...given] of steps) answers.push((await DO[what](...given)) ?? null);
await browser.close();
console.log(JSON.stringify(answers));
