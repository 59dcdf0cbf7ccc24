"use strict";
// Node loads this before the gateway, in the image alone: it leads the gateway to the compile cache that
// the image's build has made (see image/warm.mjs).
//
// The name of a compile cache contains the processor's features and the user's id, so that it is known only
// here. The gateway chooses a directory of its own, and this makes the entry in it a link to the image's. Where
// anything is different from what is expected, the gateway starts as it would have, with more to compile.
//
// Refuses to serve root: the agent may add to the image's cache (not change it), and root runs nothing
// that the agent has written.
const fs = require("node:fs");
const path = require("node:path");
const module_ = require("node:module");
const { cachedDataVersionTag } = require("node:v8");

const CACHE = path.join(__dirname, "compile-cache", process.version);
const enable = module_.enableCompileCache;

function lead(directory) {
  const tag = (cachedDataVersionTag() >>> 0).toString(16).padStart(8, "0");
  const name = [process.version, process.arch, tag, process.getuid()].join("-");
  fs.mkdirSync(directory, { recursive: true });
  fs.symlinkSync(CACHE, path.join(directory, name));
}

if (process.getuid() !== 0) {
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
