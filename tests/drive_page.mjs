// Works javascript/'s page as a person would: node drive_page.mjs FOLDER CHROMIUM URL. A line on stdin is a list of steps, each
// [what, ...]: files PATHS; drop PATHS; fill LABEL TEXT; value LABEL; press NAME; table; error; about; width PIXELS; outside; strange;
// found, what the page says of texts: [text, number, length of its bar]; visit URL, of another server of the page;
// open FILE, for a page that is a file; places SELECTOR, where such elements are: [text, left, top, right, bottom];
// send URL, from within the page.
// They go to a page of their own; a line on stdout is the list of their answers, null where there is none.

import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import readline from "node:readline";
import { pathToFileURL } from "node:url";

const [folder, executablePath, url] = process.argv.slice(2);
const { chromium } = createRequire(path.join(folder, "package.json"))("playwright-core");
const browser = await chromium.launch({ executablePath, args: process.getuid?.() === 0 ? ["--no-sandbox"] : [] });

async function work(steps) {
  const page = await browser.newPage();
  page.setDefaultTimeout(20000);
  const strange = []; // what the page asks of others, and what it did not expect
  let home = url;
  page.on("request", (request) => {
    if (!/^(?:data|blob|file):/.test(request.url()) && !request.url().startsWith(home)) strange.push(request.url());
  });
  page.on("pageerror", (error) => strange.push(String(error)));

  // Until the page is done with what it was told.
  const settled = () => page.waitForFunction(() => document.getElementById("status").textContent === "");
  const field = (label) => page.getByLabel(label, { exact: true });

  const can = {
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
      const textOf = async (place) => ((await page.locator(place).isVisible()) ? page.locator(place).innerText() : null);
      return {
        rows, warning: await textOf("#warning"), caption: await textOf("#outputs figcaption"), cut: await textOf("#outputs .cut"),
        sideways: await textOf("#outputs .hint"), timing: await textOf("#timing"),
      };
    },
    found: async () => {
      if (!(await page.locator("#found").isVisible())) return null;
      const rows = await page.locator("#rows li").evaluateAll((all) => all.map((row) => [
        row.querySelector("span").textContent, Number(row.querySelector("b").textContent), row.querySelector("meter").value,
      ]));
      return { rows, title: await page.locator("#found-title").innerText(), note: await page.locator("#note").innerText() };
    },
    about: async () => ((await page.locator("#about").isVisible()) ? page.locator("#about").innerText() : null),
    visit: async (address) => {
      home = new URL("/", address).href;
      await page.goto("about:blank"); // an address that differs by its fragment alone would not be loaded
      await page.goto(address, { waitUntil: "load" });
      await settled();
    },
    error: async () => ((await page.locator("#error").isVisible()) ? page.locator("#error").innerText() : null),
    width: async (width) => { // of all that there is, where the window is so wide
      await page.setViewportSize({ width, height: 800 });
      return page.evaluate(() => document.scrollingElement.scrollWidth);
    },
    outside: () => page.evaluate(() => { // what reaches beyond the box that it is in, but for tables, which scroll
      const found = [];
      for (const box of document.querySelectorAll("main, section, form, .drop, .scroll")) {
        const inner = box.getBoundingClientRect().right - parseFloat(getComputedStyle(box).paddingRight);
        for (const one of box.querySelectorAll("*")) {
          const scrolling = one.parentElement.closest(".scroll");
          const { width, right } = one.getBoundingClientRect();
          if (width > 0 && !scrolling && right > inner + 0.5) found.push(`${one.tagName} ${one.id || one.className}`);
        }
      }
      return found;
    }),
    open: (file) => page.goto(pathToFileURL(file).href, { waitUntil: "load" }).then(() => null),
    places: (selector) => page.locator(selector).evaluateAll((all) => all.map((one) => {
      const { left, top, right, bottom } = one.getBoundingClientRect();
      return [one.textContent, left, top, right, bottom];
    })),
    send: (to) => page.evaluate((place) => fetch(place, { mode: "no-cors" }).then(() => "sent", (error) => String(error)), to),
    strange: () => strange,
  };
  await page.goto(url, { waitUntil: "load" });
  const answers = [];
  for (const [what, ...given] of steps) answers.push((await can[what](...given)) ?? null);
  await page.close();
  return answers;
}

for await (const line of readline.createInterface({ input: process.stdin })) {
  console.log(JSON.stringify(await work(JSON.parse(line))));
}
await browser.close();
