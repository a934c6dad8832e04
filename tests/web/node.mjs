// What tests/web/test_web.py asks of web/pomona.js, in Node: `node node.mjs COMMAND ARGUMENTS`, the answer is JSON.
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { deflateRawSync, inflateRawSync } from "node:zlib";
import { digestOf, load, Network, read } from "../../web/pomona.js";

const ARRAYS = { float32: Float32Array, int32: Int32Array, int64: BigInt64Array };
const numbers = (file, dtype) => new ARRAYS[dtype](new Uint8Array(readFileSync(file)).buffer);
const text = (value) => (Object.is(value, -0) ? "-0" : String(value)); // JSON has no NaN and no -0

const commands = {
  /** Outputs of a network for inputs in files, of the dtypes that it takes. */
  async run(file, options, ...inputs) {
    const network = await load(readFileSync(file), JSON.parse(options));
    const arrays = inputs.map((input, i) => numbers(input, network.dtypes[i]));
    const found = network.run(...arrays);
    const again = network.run(...arrays);
    const outputs = network.outputs.length === 1 ? [found] : found;
    if (
      !outputs.every((output, i) =>
        output.every((x, k) => Object.is(x, (network.outputs.length === 1 ? again : again[i])[k])),
      )
    )
      throw new Error("a second run gives other numbers");
    return {
      outputs: outputs.map((output) => Array.from(output, text)),
      shapes: network.outputs,
      info: network.info,
    };
  },

  /** Everything that a file holds; `subtle`: whether the browser brings SHA-256. */
  async dump(file, subtle) {
    if (subtle === "no") Object.defineProperty(globalThis, "crypto", { value: undefined });
    const { tensors, metadata, graph } = await read(readFileSync(file));
    const plain = ({ dtype, shape, values, positions }) => ({
      dtype,
      shape,
      values: Array.from(values, text),
      positions: positions ? Array.from(positions) : null,
    });
    return { tensors: [...tensors].map(([name, tensor]) => [name, plain(tensor)]), metadata, graph };
  },

  /** The message of the error that a file leads to. */
  async error(file, options) {
    try {
      await load(readFileSync(file), JSON.parse(options));
    } catch (error) {
      return { type: error.constructor.name, message: error.message };
    }
    return null;
  },

  /** Whether our SHA-256 is Node's, for all lengths around the block's. */
  async digests() {
    const messages = Array.from({ length: 200 }, (_, length) =>
      Uint8Array.from({ length }, (_, i) => (i * 37 + length) & 255),
    );
    return messages.every((message) => createHash("sha256").update(message).digest().equals(digestOf(message)));
  },

  /** Blocks are aligned, apart from each other, keep what is in them, and are used again. */
  async memory(wasm) {
    const { instance } = await WebAssembly.instantiate(readFileSync(wasm), {});
    const { malloc, free, memory } = instance.exports;
    const random = generator(1);
    const held = new Map();
    const fill = (place, size, value) => new Uint8Array(memory.buffer, place, size).fill(value);
    let pages = 0;
    for (let step = 0; step < 20000; step++) {
      if (held.size < 100 && random() < 0.52) {
        const size = Math.floor(2 ** (random() * 15));
        const place = malloc(size);
        if (!place || place % 64) throw new Error(`malloc(${size}) gives ${place}`);
        fill(place, size, step & 255);
        held.set(place, [size, step & 255]);
      } else if (held.size) {
        const [place, [size, value]] = [...held][Math.floor(random() * held.size)];
        if (!new Uint8Array(memory.buffer, place, size).every((byte) => byte === value))
          throw new Error("a block was overwritten");
        free(place);
        held.delete(place);
      }
      if (step === 10000) pages = memory.buffer.byteLength;
    }
    const [places, sizes] = [[...held.keys()], [...held.values()]];
    places.forEach((place, i) =>
      places.forEach((other, j) => {
        if (i !== j && place < other + sizes[j][0] && other < place + sizes[i][0]) throw new Error("blocks overlap");
      }),
    );
    return {
      tooMuch: [malloc(2 ** 31), malloc(0xffffffff), malloc(0x7fff0000)],
      grown: memory.buffer.byteLength / pages,
    };
  },

  /** Thousands of files that were tampered with: how they end, by what was done to them. */
  async hostile(file, count, seed) {
    const original = readFileSync(file);
    const random = generator(Number(seed));
    const ends = {};
    let slowest = 0;
    for (let i = 0; i < count; i++) {
      const kinds = Object.keys(tamper);
      const kind = kinds[i % kinds.length];
      const bytes = tamper[kind](original, random);
      const start = performance.now();
      const end = await ending(bytes);
      slowest = Math.max(slowest, performance.now() - start);
      const tally = (ends[kind] ??= { refused: 0, runs: 0, messages: [] });
      if (end === null) tally.runs++;
      else tally.refused++;
      if (end && !tally.messages.includes(end)) tally.messages.push(end);
    }
    return { ends, slowest };
  },
};

/** How a file ends: null if it loads and runs, else the message; what is no Error of ours is thrown on. */
async function ending(bytes) {
  try {
    const network = await load(bytes, { maxBytes: 2 ** 24 });
    if (network.info.denseMacs < 1e8)
      network.run(...network.inputs.map((shape, i) => filled(network.dtypes[i], shape)));
    return null;
  } catch (error) {
    if (error.constructor !== Error || /engine failed/.test(error.message)) throw error;
    return error.message;
  }
}

function filled(dtype, shape) {
  return new ARRAYS[dtype](shape.reduce((a, b) => a * b)).fill({ float32: 0.5, int32: 1, int64: 1n }[dtype]);
}

/** Numbers in [0, 1), the same for the same seed. */
function generator(seed) {
  return () => {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    return seed / 2 ** 32;
  };
}

const pick = (random, items) => items[Math.floor(random() * items.length)];

function taken(bytes) {
  const length = Number(bytes.readBigUInt64LE(0));
  return { header: bytes.toString("utf8", 8, 8 + length), payload: inflateRawSync(bytes.subarray(8 + length + 32)) };
}

/** A file whose sizes and checksum are right, whatever else is not. */
function assembled(header, stream) {
  const size = 32 + stream.length;
  const text = Buffer.from(
    header.replace(/"shape":\[\d+\],"data_offsets":\[0,\d+\]\}\}$/, `"shape":[${size}],"data_offsets":[0,${size}]}}`),
  );
  const start = Buffer.alloc(8);
  start.writeBigUInt64LE(BigInt(text.length));
  const digest = createHash("sha256").update(start).update(text).update(stream).digest();
  return Buffer.concat([start, text, digest, stream]);
}

const NUMBERS = [
  "0",
  "1",
  "2",
  "3",
  "7",
  "255",
  "256",
  "4096",
  "65536",
  "2147483647",
  "2147483648",
  "4294967295",
  "9007199254740993",
  "999999999999999",
  "-1",
  "1e9",
  "1.5",
  "01",
  "",
];

function withOtherNumber(text, random) {
  const places = [...text.matchAll(/\d+/g)];
  const { index, 0: digits } = pick(random, places);
  return text.slice(0, index) + pick(random, NUMBERS) + text.slice(index + digits.length);
}

function withOtherBytes(bytes, random) {
  const changed = Buffer.from(bytes);
  for (let n = 1 + Math.floor(random() * 3); n > 0; n--)
    changed[Math.floor(random() * changed.length)] = Math.floor(random() * 256);
  return changed;
}

function graphLength(header) {
  return Number(/"graph":"(\d+)"/.exec(header)[1]);
}

function withGraph(bytes, change) {
  const { header, payload } = taken(bytes);
  const length = graphLength(header);
  const graph = Buffer.from(change(payload.toString("utf8", 0, length)));
  const longer = header.replace(/"graph":"\d+"/, `"graph":"${graph.length}"`);
  return assembled(longer, deflateRawSync(Buffer.concat([graph, payload.subarray(length)])));
}

const tamper = {
  truncated: (bytes, random) => bytes.subarray(0, Math.floor(random() * bytes.length)),
  damaged: (bytes, random) => {
    const changed = Buffer.from(bytes);
    changed[Math.floor(random() * changed.length)] ^= 1 << Math.floor(random() * 8);
    return changed;
  },
  longer: (bytes, random) => Buffer.concat([bytes, Buffer.alloc(1 + Math.floor(random() * 100))]),
  // From here on with a right checksum.
  stream: (bytes, random) => {
    const { header, payload } = taken(bytes);
    return assembled(header, withOtherBytes(deflateRawSync(payload), random));
  },
  cutStream: (bytes, random) => {
    const { header, payload } = taken(bytes);
    const stream = deflateRawSync(payload);
    return assembled(header, stream.subarray(0, Math.floor(random() * stream.length)));
  },
  followed: (bytes, random) => {
    const { header, payload } = taken(bytes);
    return assembled(
      header,
      Buffer.concat([
        deflateRawSync(payload),
        Buffer.alloc(1 + Math.floor(random() * 9), Math.floor(random() * 256)),
      ]),
    );
  },
  payload: (bytes, random) => {
    const { header, payload } = taken(bytes);
    return assembled(header, deflateRawSync(withOtherBytes(payload, random)));
  },
  cutPayload: (bytes, random) => {
    const { header, payload } = taken(bytes);
    return assembled(header, deflateRawSync(payload.subarray(0, Math.floor(random() * payload.length))));
  },
  bomb: (bytes, random) => {
    const { header, payload } = taken(bytes);
    return assembled(
      header,
      deflateRawSync(Buffer.concat([payload, Buffer.alloc(2 ** 24, random() < 0.5 ? 255 : 0)])),
    );
  },
  header: (bytes, random) => {
    const { header, payload } = taken(bytes);
    return assembled(withOtherBytes(Buffer.from(header), random).toString("latin1"), deflateRawSync(payload));
  },
  headerNumber: (bytes, random) => {
    const { header, payload } = taken(bytes);
    return assembled(withOtherNumber(header, random), deflateRawSync(payload));
  },
  graph: (bytes, random) =>
    withGraph(bytes, (graph) => withOtherBytes(Buffer.from(graph), random).toString("latin1")),
  graphNumber: (bytes, random) => withGraph(bytes, (graph) => withOtherNumber(graph, random)),
};

const [command, ...rest] = process.argv.slice(2);
console.log(JSON.stringify(await commands[command](...rest)));
