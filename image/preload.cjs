"use strict";
// Node loads this before the gateway, in the image alone: it leads the gateway to the compile cache that
// the image's build has made (see image/warm.mjs).
//
// The name of a compile cache contains the processor's features and the user's id, so that it is known only
// here. The gateway chooses a directory of its own, and this makes the entry in it a link to the image's. Where
// anything is different from what is expected, the gateway starts as it would have, with a cache of its own.
//
// Refuses a Node with options, in NODE_OPTIONS or beside the ones that the supervisor gives: with many of them V8
// rejects every entry, and then Node compiles all of it at each start, since nothing new is kept there.
//
// Refuses to serve root: the directory that the gateway chooses lies where the agent writes.
const fs = require("node:fs");
const path = require("node:path");
const module_ = require("node:module");
const { cachedDataVersionTag } = require("node:v8");

const CACHE = path.join(__dirname, "compile-cache", process.version);
const enable = module_.enableCompileCache;

/** Whether this Node has no options but `--require` with this file. */
function isPlain() {
  const [option, file, ...more] = process.execArgv;
  return !process.env.NODE_OPTIONS && option === "--require" && file === __filename && more.length === 0;
}

function lead(directory) {
  const tag = (cachedDataVersionTag() >>> 0).toString(16).padStart(8, "0");
  const name = [process.version, process.arch, tag, process.getuid()].join("-");
  fs.mkdirSync(directory, { recursive: true });
  fs.symlinkSync(CACHE, path.join(directory, name));
}

if (process.getuid() !== 0 && isPlain()) {
  module_.enableCompileCache = function (directory, ...rest) {
    // Once: the gateway asks a second time, and what comes after is not the gateway's start.
    module_.enableCompileCache = enable;
    try {
      if (typeof directory === "string" && fs.existsSync(CACHE)) lead(directory);
    } catch {
      // There is one already, or none can be made.
    }
    return enable.call(this, directory, ...rest);
  };
}
