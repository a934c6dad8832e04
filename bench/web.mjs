// Called by bench/web.py: `node web.mjs FOLDER NAMES...`, with the networks in FOLDER. Prints a JSON line each.
//
// Runs alternate in one process; a sample is at least 4 ms of runs in a row. Times are CPU time, which other programs
// disturb less than the clock, of all of V8: --single-threaded keeps it in one thread. --no-liftoff leaves out its quick
// and slow translation of WebAssembly, which would be in some samples and not in others.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import { join } from "node:path";
import { Network, read } from "../web/pomona.js";

const [folder, peers, samples, ...names] = process.argv.slice(2);
const require = createRequire(pathToFileURL(join(peers, "node_modules", "x.js")));
const ort = require("onnxruntime-web");
ort.env.wasm.numThreads = 1;
ort.env.logLevel = "error";

const spent = () => {
  const { user, system } = process.cpuUsage();
  return user + system;
};

async function sample(runs, repeats) {
  const [clock, cpu] = [performance.now(), spent()];
  for (let i = 0; i < repeats; i++) await runs();
  return { cpu: (spent() - cpu) / repeats, clock: ((performance.now() - clock) * 1000) / repeats };
}

const sorted = (values) => [...values].sort((a, b) => a - b);
const summary = (values) => {
  const s = sorted(values);
  return { median: s[s.length >> 1], least: s[0], p90: s[Math.floor(0.9 * s.length)] };
};

for (const name of names) {
  const file = await read(readFileSync(join(folder, `${name}.pomona.safetensors`)));
  const shape = JSON.parse(readFileSync(join(folder, `${name}.json`))).shape;
  const x = new Float32Array(new Uint8Array(readFileSync(join(folder, `${name}.input`))).buffer);
  const auto = await Network.from(file);
  const dense = await Network.from(file, { dense: "always" });
  const fixed = await Network.from(file, { precision: "int16" });
  const session = await ort.InferenceSession.create(join(folder, `${name}.onnx`), {
    executionProviders: ["wasm"],
    graphOptimizationLevel: "all",
  });
  const input = session.inputNames[0];
  const tensor = new ort.Tensor("float32", x, [1, ...shape]);

  const candidates = {
    sparse: () => auto.run(x),
    dense: () => dense.run(x),
    int16: () => fixed.run(x),
    onnxruntime: async () => Object.values(await session.run({ [input]: tensor }))[0].data,
  };
  const results = {};
  for (const [key, run] of Object.entries(candidates)) results[key] = await run();
  const largest = results.onnxruntime.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
  const error = (key) =>
    results[key].reduce((most, value, i) => Math.max(most, Math.abs(value - results.onnxruntime[i])), 0) / largest;
  const errors = { sparse: error("sparse"), dense: error("dense"), int16: error("int16") };

  const repeats = {};
  for (const [key, run] of Object.entries(candidates)) {
    const end = performance.now() + 500; // browsers compile twice
    let n = 0;
    for (; performance.now() < end; n++) await run();
    const one = (await sample(run, Math.max(1, Math.ceil(n / 50)))).cpu;
    repeats[key] = Math.max(1, Math.ceil(4000 / one));
  }
  const times = Object.fromEntries(Object.keys(candidates).map((key) => [key, []]));
  for (let i = 0; i < Number(samples); i++)
    for (const [key, run] of Object.entries(candidates)) times[key].push(await sample(run, repeats[key]));
  const microseconds = Object.fromEntries(
    Object.entries(times).map(([key, each]) => [
      key,
      {
        cpu: summary(each.map(({ cpu }) => cpu)),
        clock: summary(each.map(({ clock }) => clock)),
      },
    ]),
  );
  console.log(
    JSON.stringify({
      name,
      ...auto.info,
      errors,
      microseconds,
      repeats,
      node: process.version,
      v8: process.versions.v8,
      onnxruntime: ort.env.versions?.web ?? ort.env.versions?.common,
    }),
  );
  await session.release();
}
