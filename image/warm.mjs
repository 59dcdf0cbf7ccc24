// Inside the image's build: Node's compile cache of what the gateway loads until it is ready, for image/preload.cjs.
//
//     node image/warm.mjs OPENCLAW-DIR ENTRYPOINTS
//
// The modules that ENTRYPOINTS lists, and all that they import, are compiled without being run, by a V8 that does one
// thing at a time and takes its random numbers from a fixed seed: the same files give the same bytes. Neither changes
// what V8 takes a cache for, so that every other Node of this version takes it. CommonJS is compiled when it
// runs, and left out: a few hundred small files, which the gateway compiles at each start.
//
// Refuses a list of another version of the gateway.
import { spawnSync } from "node:child_process";
import { chmodSync, existsSync, mkdirSync, readFileSync, readdirSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { crc32 } from "node:zlib";

// Always the same: what V8 compiles depends on the length of a path in a few bytes.
const scratch = "/tmp/warm";

/** The URLs of the modules in the list. */
function entrypoints(root, list) {
  const names = readFileSync(list, "utf8").split("\n").filter((line) => line && !line.startsWith("#"));
  const files = names.map((name) => join(root, "node_modules", name));
  const missing = files.filter((file) => !existsSync(file));
  if (missing.length > 0) {
    throw new Error(`${list} is of another version of the gateway, see image/entrypoints.mjs; missing: ${missing[0]}`);
  }
  return files.map((file) => pathToFileURL(file).href);
}

/** How Node calls the cache of a module (type 1) with this URL. */
function nameOf(url) {
  return crc32(url, crc32(Buffer.from([1]))).toString(16).padStart(8, "0");
}

/** The directory of what was compiled. The last import cannot be linked, so that nothing runs. */
function compile(urls) {
  const all = join(scratch, "all.mjs");
  const cache = join(scratch, "cache");
  const imports = urls.map((url) => `import ${JSON.stringify(url)};\n`).join("");
  mkdirSync(scratch);
  writeFileSync(all, `${imports}import { nothing } from "node:fs";\n`);
  const script = `import(${JSON.stringify(pathToFileURL(all).href)}).then(
    () => { throw new Error("linked"); },
    (error) => { if (!/export named 'nothing'/.test(error.message)) throw error; });`;
  const done = spawnSync(process.execPath, ["--predictable", "--random-seed=1", "--eval", script], {
    env: { NODE_COMPILE_CACHE: cache },
    stdio: "inherit",
  });
  if (done.status !== 0) throw new Error("the modules cannot be compiled");
  const made = join(cache, readdirSync(cache)[0]);
  rmSync(join(made, nameOf(pathToFileURL(all).href)));
  return made;
}

const [root, list] = process.argv.slice(2);
const urls = entrypoints(root, list);
const made = compile(urls);
const names = new Set(readdirSync(made));
const left = urls.filter((url) => !names.has(nameOf(url)));
if (left.length > 0) throw new Error(`not compiled: ${left[0]}`);
const place = join(root, "compile-cache", process.version);
mkdirSync(join(root, "compile-cache"));
for (const name of names) chmodSync(join(made, name), 0o644);
renameSync(made, place);
rmSync(scratch, { recursive: true });
// Root's alone: where Node may write, a process that takes none of this leaves thousands of temporary files at
// each end, since it cannot rename them to what is here.
chmodSync(place, 0o755);
console.log(`compile cache: ${names.size} modules`);
