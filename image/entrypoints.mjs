// Writes the list of modules that image/warm.mjs compiles, after the gateway's version in image/openclaw has changed:
//
//     NODE --experimental-import-meta-resolve image/entrypoints.mjs OPENCLAW-DIR >image/openclaw/entrypoints
//
// with the Node and the directory of that version, which holds `node_modules`: target/openclaw, where tests/setup puts
// them. It starts the gateway in a state directory that is thrown away. What Node has cached then shows which
// modules were loaded. Printed are those that none of the others imports by a statement: this is a few hundred of
// thousands, and each of them stands for all that it imports.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdirSync, mkdtempSync, readFileSync, readdirSync, realpathSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { createServer } from "node:net";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { pathToFileURL } from "node:url";
import { crc32 } from "node:zlib";

const PATIENCE_MS = 15 * 60_000;
// What follows the start within this time belongs to it.
const QUIET_MS = 10_000;

const root = realpathSync(process.argv[2]);
const scratch = mkdtempSync(join(tmpdir(), "entrypoints-"));
const log = [];

/** A port that nobody listens on: the build may be on a network that others use. */
async function freePort() {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address();
  server.close();
  await once(server, "close");
  return port;
}

/** Whether the gateway is ready. */
async function isReady(port) {
  try {
    return (await fetch(`http://127.0.0.1:${port}/readyz`)).ok;
  } catch {
    return false;
  }
}

/** Runs the gateway until it is ready and loads nothing more, and returns the directory of what Node cached. */
async function start() {
  const port = await freePort();
  const cache = join(scratch, "tmp", "node-compile-cache");
  const state = join(scratch, "state");
  mkdirSync(join(scratch, "tmp"), { recursive: true });
  mkdirSync(state);
  const configuration = {
    gateway: {
      mode: "local",
      bind: "loopback",
      port,
      auth: { mode: "token", token: "of-the-build-and-not-of-the-image" },
      http: { endpoints: { chatCompletions: { enabled: true } } },
    },
  };
  writeFileSync(join(state, "openclaw.json"), JSON.stringify(configuration));
  const gateway = spawn(
    process.execPath,
    [join(root, "node_modules/openclaw/openclaw.mjs"), "gateway", "run", "--bind", "loopback", "--port", String(port)],
    {
      env: {
        PATH: process.env.PATH,
        HOME: scratch,
        TMPDIR: join(scratch, "tmp"),
        OPENCLAW_STATE_DIR: state,
        OPENCLAW_NO_RESPAWN: "1",
        OPENCLAW_NO_AUTO_UPDATE: "1",
        OPENCLAW_DISABLE_BONJOUR: "1",
        OPENCLAW_SERVICE_REPAIR_POLICY: "external",
        NODE_DEBUG_NATIVE: "COMPILE_CACHE",
      },
      stdio: ["ignore", "pipe", "pipe"],
    },
  );
  let heard = Date.now();
  for (const stream of [gateway.stdout, gateway.stderr]) {
    stream.setEncoding("utf8");
    stream.on("data", (text) => {
      if (text.includes("[compile cache] reading cache")) heard = Date.now();
      log.push(text);
    });
  }
  const ended = once(gateway, "exit");
  const deadline = Date.now() + PATIENCE_MS;
  let ready = false;
  while (!ready || Date.now() < heard + QUIET_MS) {
    if (gateway.exitCode !== null || Date.now() > deadline) {
      throw new Error(`the gateway does not get ready:\n${log.join("").slice(-20_000)}`);
    }
    await sleep(200);
    ready ||= await isReady(port);
  }
  gateway.kill("SIGTERM");
  await ended;
  return cache;
}

/** The names of all files below a directory, at any depth. */
function filesBelow(directory) {
  const entries = readdirSync(directory, { recursive: true, withFileTypes: true });
  return entries.filter((entry) => entry.isFile()).map((entry) => join(entry.parentPath, entry.name));
}

/** How Node calls the cache of a module (type 1) with this URL. */
function nameOf(url) {
  return crc32(url, crc32(Buffer.from([1]))).toString(16).padStart(8, "0");
}

/** The modules below `root` that the names of these cache files stand for, in order. */
function modulesOf(cache) {
  const names = new Set(filesBelow(cache).map((file) => file.slice(file.lastIndexOf("/") + 1)));
  const urls = filesBelow(join(root, "node_modules"))
    .filter((file) => /\.m?js$/.test(file))
    .map((file) => pathToFileURL(file).href);
  return urls.filter((url) => names.has(nameOf(url))).sort();
}

/** What a module imports by statements, as far as that can be seen without understanding JavaScript. */
function importsOf(url) {
  const statement = /(?:^|[;\n}\s])(?:import|export)\s*(?:[\w*{][^"'();]*?from\s*)?["']([^"'\n]+)["']/g;
  const found = [];
  for (const [, specifier] of readFileSync(new URL(url), "utf8").matchAll(statement)) {
    try {
      found.push(import.meta.resolve(specifier, url));
    } catch {
      // It only looked like a statement.
    }
  }
  return found.filter((other) => other !== url);
}

const urls = modulesOf(await start());
const imported = new Set(urls.flatMap(importsOf));
const above = pathToFileURL(join(root, "node_modules")).href + "/";
const names = urls.filter((url) => !imported.has(url)).map((url) => url.slice(above.length));
console.log(`# What image/entrypoints.mjs has written for this version of the gateway: the modules that a start imports by
# itself; the others follow from them. Of image/warm.mjs.
${names.join("\n")}`);
rmSync(scratch, { recursive: true, force: true });
