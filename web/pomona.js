// Pomona's files and networks in JavaScript: for browsers and Node, without dependencies.
//
//   const network = await load("digits.pomona.safetensors");
//   const logits = network.run(pixels); // Float32Array to Float32Array
//
// The file is that of docs/file-format.md, the engine is core/ compiled to WebAssembly (pomona.wasm). A file is not
// trusted: a bad one leads to an Error, takes no more memory than `maxBytes`, and no more time than its size explains.

const MAX_BYTES = 2 ** 28; // of a file's tensors as dense ones; and of what the engine makes of them

// --- Files ---

const FORMAT = "pomona 1";
const MAX_HEADER = 2 ** 24;
const MAX_DIMENSIONS = 32;
const MAX_LOW_BITS = 40;
const DIGEST = 32;
const SLICE = 4096; // bytes inflated at a time: no more than a thousand times as many are ever in wait

// Elements of a dtype: bytes each, and the array that they become. The order is that of the format.
const DTYPES = {
  F64: [8, Float64Array],
  F32: [4, Float32Array],
  F16: [2, halves],
  BF16: [2, brainFloats],
  F8_E4M3: [1, Uint8Array], // patterns
  F8_E5M2: [1, Uint8Array],
  C64: [8, Float32Array], // real, imaginary, real, ...
  I64: [8, BigInt64Array],
  I32: [4, Int32Array],
  I16: [2, Int16Array],
  I8: [1, Int8Array],
  U64: [8, BigUint64Array],
  U32: [4, Uint32Array],
  U16: [2, Uint16Array],
  U8: [1, Uint8Array],
  BOOL: [1, Uint8Array],
};
const FLOATS = ["F64", "F32", "F16", "BF16"];

/** What a file holds.
 *
 * tensors: a Map of names to {dtype, shape, values, positions}. Without `positions` all elements are in `values`, row
 * by row; with them only those at these positions, which ascend, and the others are zero. F16 and BF16 are widened.
 * metadata: an object of strings. graph: what the network computes, or null.
 *
 * source: a URL, a Response, or the bytes. maxBytes: what the tensors may take as dense ones. */
export async function read(source, { maxBytes = MAX_BYTES } = {}) {
  const bytes = await bytesOf(source, maxBytes);
  const { metadata, start } = readHeader(bytes);
  const stream = bytes.subarray(start + DIGEST);
  const digest = await sha256([bytes.subarray(0, start), stream]);
  if (digest.some((byte, i) => byte !== bytes[start + i]))
    throw new Error("the checksum is wrong: the file was damaged or changed after it was written");
  const { format, tensors, books, graph, ...others } = metadata;
  const plan = readDirectory(tensors, books, graph);
  const denseBytes = sum(plan.own, (entry) => size(entry.shape) * DTYPES[entry.dtype][0]);
  if (denseBytes > maxBytes)
    throw new Error(`the tensors would take ${denseBytes} bytes, more than maxBytes=${maxBytes}`);
  return { ...decode(plan, await inflate(stream, plan)), metadata: others };
}

async function bytesOf(source, most = Infinity) {
  if (source instanceof ArrayBuffer) return new Uint8Array(source);
  if (ArrayBuffer.isView(source)) return new Uint8Array(source.buffer, source.byteOffset, source.byteLength);
  if (source instanceof URL && source.protocol === "file:") {
    const { readFile } = await import("node:fs/promises"); // Node's fetch has no files
    return new Uint8Array(await readFile(source));
  }
  const response = source instanceof Response ? source : await fetch(source);
  if (!response.ok) throw new Error(`${response.url} cannot be had: ${response.status} ${response.statusText}`);
  const bytes = await gather(response.body.getReader(), most);
  if (!bytes) throw new Error(`the file has more than ${most} bytes, which is all that maxBytes allows`);
  return bytes;
}

/** All bytes of a stream, or null where there are more than `most`. */
async function gather(reader, most) {
  const chunks = [];
  let length = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    length += value.length;
    if (length > most) {
      reader.cancel().catch(() => {});
      return null;
    }
    chunks.push(value);
  }
  return joined(chunks, length);
}

function joined(chunks, length) {
  const whole = new Uint8Array(length);
  let at = 0;
  for (const chunk of chunks) {
    whole.set(chunk, at);
    at += chunk.length;
  }
  return whole;
}

function readHeader(bytes) {
  if (bytes.length < 8)
    throw new Error(`the file is cut off: it has ${bytes.length} bytes, and a header begins with 8`);
  const length = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  if (length > Math.min(MAX_HEADER, bytes.length - 8))
    throw new Error(`the header would have ${length} bytes; it is no safetensors file, or cut off`);
  const header = parseJson(bytes.subarray(8, 8 + length), "the header");
  const { __metadata__: metadata, pomona: data, ...more } = header;
  if (!isObject(metadata) || !Object.values(metadata).every((value) => typeof value === "string"))
    throw new Error("the header has no __metadata__ of strings");
  if (metadata.format !== FORMAT)
    throw new Error(
      `the format is ${short(metadata.format)}, not "${FORMAT}": it is of another version of Pomona, or not of Pomona`,
    );
  const left = bytes.length - 8 - length;
  if (
    Object.keys(more).length ||
    !isObject(data) ||
    JSON.stringify([data.dtype, data.shape, data.data_offsets]) !== JSON.stringify(["U8", [left], [0, left]]) ||
    left < DIGEST
  )
    throw new Error(`the header does not describe the ${left} bytes that follow as one tensor of bytes, pomona`);
  return { metadata, start: 8 + length };
}

/** JSON of UTF-8 bytes, without duplicate keys. */
function parseJson(bytes, what) {
  let text, value;
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    value = JSON.parse(text);
  } catch (error) {
    throw new Error(`${what} is not JSON: ${error.message}`);
  }
  if (!isObject(value)) throw new Error(`${what} is not a JSON object`);
  const open = []; // keys of the objects that we are in, null of arrays
  for (const [, token, isKey] of text.matchAll(/("(?:[^"\\]|\\.)*"|[{}[\]])\s*(:)?/g)) {
    if (token === "{" || token === "[") open.push(token === "{" ? new Set() : null);
    else if (token === "}" || token === "]") open.pop();
    else if (isKey) {
      const keys = open.at(-1);
      const key = JSON.parse(token);
      if (keys.has(key)) throw new Error(`${what} has the key ${short(key)} twice in one object`);
      keys.add(key);
    }
  }
  return value;
}

const INT = "(?:0|[1-9][0-9]{0,14})";
const NAME = "((?:[A-Za-z0-9._~-]|%[0-9A-F]{2})+)";
const LINE = new RegExp(
  `^${NAME}(?:=${NAME}| ([A-Z0-9_]+)(?::(F16|q${INT}))? (-|${INT}(?:x${INT})*)(?: (${INT})/(${INT}))?)$`,
);
const BOOK = new RegExp(`^(table|uniform) (F16|F32) (${INT})$`);

/** The directory, checked: `own` tensors, names of all, codebooks, and the length of the graph. */
function readDirectory(tensors, books, graph) {
  if (tensors === undefined) throw new Error("the header has no list of tensors");
  if (graph !== undefined && !new RegExp(`^${INT}$`).test(graph))
    throw new Error(`the graph's length is ${short(graph)}`);
  const plan = {
    graphBytes: graph === undefined ? null : Number(graph),
    books: books === undefined ? [] : books.split(";").map(readBook),
    own: [],
    names: new Map(), // to entries of `own`
  };
  for (const line of tensors === "" ? [] : tensors.split(";")) {
    const [, name, first, dtype, storage = "", shape, kept, low] = LINE.exec(line) ?? [];
    if (name === undefined) throw new Error(`the header describes a tensor as ${short(line)}, which cannot be read`);
    if (plan.names.has(unquoted(name))) throw new Error(`tensor ${short(name)} is there twice`);
    if (first === undefined) {
      const entry = readEntry(unquoted(name), dtype, storage, shape, kept, low, plan.books.length);
      plan.own.push(entry);
      plan.names.set(entry.name, entry);
    } else {
      const entry = plan.names.get(unquoted(first));
      if (entry?.name !== unquoted(first))
        throw new Error(`tensor ${short(name)} is tied to ${short(first)}, which is none before it`);
      plan.names.set(unquoted(name), entry);
    }
  }
  return plan;
}

function unquoted(name) {
  try {
    return decodeURIComponent(name);
  } catch {
    throw new Error(`the name ${short(name)} is not UTF-8`);
  }
}

function readBook(text) {
  const [, kind, dtype, digits] = BOOK.exec(text) ?? [];
  const count = Number(digits);
  if (!(count >= 1 && count <= 256) || (kind === "uniform" && (count % 2 || dtype !== "F32")))
    throw new Error(`the header describes a codebook as ${short(text)}, which cannot be read`);
  return { kind, dtype, count };
}

function readEntry(name, dtype, storage, sizes, kept, low, numBooks) {
  if (!Object.hasOwn(DTYPES, dtype))
    throw new Error(`tensor ${short(name)} has dtype ${short(dtype)}, which is not known`);
  const shape = sizes === "-" ? [] : sizes.split("x").map(Number);
  const all = size(shape);
  if (shape.length > MAX_DIMENSIONS || size(shape.filter((dim) => dim)) > 2 ** 53)
    throw new Error(`tensor ${short(name)} is too large: ${short(sizes)}`);
  const book = storage.startsWith("q") ? Number(storage.slice(1)) : null;
  if (book === null ? storage && !["F64", "F32"].includes(dtype) : book >= numBooks || !FLOATS.includes(dtype))
    throw new Error(`tensor ${short(name)} of ${dtype} cannot be stored as ${short(storage)}`);
  const isSparse = kept !== undefined;
  const entry = {
    name,
    dtype,
    shape,
    book,
    isSparse,
    all,
    count: isSparse ? Number(kept) : all,
    low: isSparse ? Number(low) : 0,
  };
  if (entry.count > all || entry.low > MAX_LOW_BITS)
    throw new Error(`tensor ${short(name)} of ${sizes} cannot have ${kept}/${low}`);
  entry.written = book === null ? storage || dtype : null;
  return entry;
}

/** Least and most bytes of the payload: only the content of the last section says how long that is. */
function payloadBytes({ graphBytes, books, own }) {
  const sparse = own.filter((entry) => entry.isSparse);
  const kept = sum(sparse, (entry) => entry.count);
  const fixed =
    (graphBytes ?? 0) +
    sum(sparse, lowBytes) +
    sum(books, ({ kind, dtype, count }) => (kind === "uniform" ? 4 : count * DTYPES[dtype][0])) +
    sum(own, (entry) => entry.count * (entry.book === null ? DTYPES[entry.written][0] : 1));
  const escapes = sum(sparse, (entry) =>
    entry.count ? Math.floor(Math.floor(entry.all / 2 ** entry.low) / 255) : 0,
  );
  return { least: fixed + kept, most: fixed + kept + escapes };
}

const lowBytes = (entry) => Math.ceil((entry.count * entry.low) / 8);

async function inflate(stream, plan) {
  const { least, most } = payloadBytes(plan);
  const payload = await inflated(stream, most);
  // Not all browsers object to bytes after the end. A stream that ends with its last byte is cut off without it.
  const isCutOff = await inflated(stream.subarray(0, -1), most).then(
    () => false,
    () => true,
  );
  if (!isCutOff) throw new Error("the compressed data are followed by something else");
  if (payload.length < least)
    throw new Error(`the payload has ${payload.length} bytes, less than the ${least} of its tensors`);
  return payload;
}

async function inflated(stream, most) {
  const { readable, writable } = new DecompressionStream("deflate-raw");
  const writer = writable.getWriter();
  const feed = async () => {
    for (let at = 0; at < stream.length; at += SLICE) await writer.write(stream.subarray(at, at + SLICE));
    await writer.close();
  };
  const fed = feed().then(
    () => null,
    (error) => error,
  ); // what is wrong shows at both ends
  let payload, failure;
  try {
    payload = await gather(readable.getReader(), most);
    failure = payload && (await fed);
  } catch (error) {
    failure = error;
  }
  if (failure) throw new Error("the compressed data cannot be inflated", { cause: failure });
  if (!payload) throw new Error(`the payload has more than the ${most} bytes of its tensors`);
  return payload;
}

function decode(plan, payload) {
  let at = 0;
  const take = (length) => payload.subarray(at, (at += length));
  const sparse = plan.own.filter((entry) => entry.isSparse);

  const graph = plan.graphBytes === null ? null : parseJson(take(plan.graphBytes), "the graph");
  const lows = new Map(sparse.map((entry) => [entry, take(lowBytes(entry))]));
  const books = plan.books.map(({ kind, dtype, count }) => {
    if (kind === "table") return elements(dtype, take(count * DTYPES[dtype][0]));
    const [step] = elements("F32", take(4));
    return Float32Array.from({ length: count }, (_, i) => step * (i < count / 2 ? i - count / 2 : i - count / 2 + 1));
  });
  const values = new Map();
  for (const entry of plan.own.filter(({ book }) => book !== null))
    values.set(entry, looked(entry, take(entry.count), books[entry.book]));
  for (const dtype of Object.keys(DTYPES)) {
    const these = plan.own.filter((entry) => entry.written === dtype);
    const each = sum(these, (entry) => entry.count) && DTYPES[dtype][0];
    const list = unshuffled(take(each * sum(these, (entry) => entry.count)), each);
    if (dtype === "BOOL" && list.some((byte) => byte > 1))
      throw new Error("booleans are stored as other than 0 and 1");
    let start = 0;
    for (const entry of these) {
      const found = elements(dtype, list.subarray(start, (start += entry.count * each)));
      values.set(entry, entry.dtype === "F64" && dtype !== "F64" ? Float64Array.from(found) : found);
    }
  }
  const positions = readPositions(sparse, lows, payload.subarray(at));

  const made = new Map(
    plan.own.map((entry) => {
      const { dtype, shape, isSparse } = entry;
      return [
        entry,
        { dtype, shape, values: values.get(entry), ...(isSparse && { positions: positions.get(entry) }) },
      ];
    }),
  );
  return { tensors: new Map([...plan.names].map(([name, entry]) => [name, made.get(entry)])), graph };
}

/** Values of a codebook, by index; of dense tensors index 0 is zero. */
function looked(entry, indices, book) {
  const table = entry.isSparse ? book : Float32Array.of(0, ...book);
  if (indices.some((index) => index >= table.length))
    throw new Error(`tensor ${short(entry.name)} refers to values beyond the ${table.length} of its codebook`);
  const found = entry.dtype === "F64" ? new Float64Array(indices.length) : new Float32Array(indices.length);
  return found.map((_, i) => table[indices[i]]);
}

/** Elements of `width` bytes, of which first all first bytes are given, then all second ones, ... */
function unshuffled(bytes, width) {
  const length = width && bytes.length / width;
  const whole = new Uint8Array(bytes.length);
  for (let k = 0; k < width; k++) for (let i = 0; i < length; i++) whole[i * width + k] = bytes[k * length + i];
  return whole;
}

/** Little-endian elements as an array; `bytes` may begin anywhere. */
function elements(dtype, bytes) {
  const [, type] = DTYPES[dtype];
  const own = bytes.slice();
  return type === halves || type === brainFloats ? type(new Uint16Array(own.buffer)) : new type(own.buffer);
}

function halves(patterns) {
  return Float32Array.from(patterns, (pattern) => {
    const exponent = (pattern >> 10) & 31;
    const fraction = pattern & 1023;
    const magnitude =
      exponent === 31
        ? fraction
          ? NaN
          : Infinity
        : exponent
          ? (1024 + fraction) * 2 ** (exponent - 25)
          : fraction * 2 ** -24;
    return pattern >> 15 ? -magnitude : magnitude;
  });
}

function brainFloats(patterns) {
  return new Float32Array(Uint32Array.from(patterns, (pattern) => pattern << 16).buffer);
}

/** Where the values of sparse tensors are: gaps of zeros, high parts as bytes and low parts as bits. */
function readPositions(sparse, lows, bytes) {
  const found = new Map();
  let at = 0;
  for (const entry of sparse) {
    const { all, count, low } = entry;
    const bits = lows.get(entry);
    const places = all < 2 ** 31 ? new Int32Array(count) : new Float64Array(count);
    const beyond = () => new Error(`tensor ${short(entry.name)} has a value beyond its ${all} elements`);
    let last = -1;
    for (let i = 0; i < count; i++) {
      let high = 0;
      while (bytes[at] === 255) {
        high += 255;
        at++;
      }
      if (at >= bytes.length) throw new Error("the positions are cut off");
      high += bytes[at++];
      let gap = high * 2 ** low;
      for (let j = 0, b = i * low; j < low; j++, b++) gap += ((bits[b >>> 3] >>> (b & 7)) & 1) * 2 ** j;
      last += 1 + gap;
      if (!(last < all)) throw beyond();
      places[i] = last;
    }
    found.set(entry, places);
  }
  if (at !== bytes.length) throw new Error("the positions are followed by something else");
  return found;
}

/** SHA-256 of all parts in a row. Pages that came over plain http from another machine have no crypto.subtle. */
async function sha256(parts) {
  const whole = joined(
    parts,
    sum(parts, (part) => part.length),
  );
  const { subtle } = globalThis.crypto ?? {};
  return subtle ? new Uint8Array(await subtle.digest("SHA-256", whole)) : digestOf(whole);
}

/** The same without crypto.subtle (FIPS 180-4). */
export function digestOf(message) {
  const primes = [];
  for (let n = 2; primes.length < 64; n++) if (primes.every((prime) => n % prime)) primes.push(n);
  const fraction = (x) => ((x - Math.floor(x)) * 2 ** 32) | 0;
  const constants = primes.map((prime) => fraction(Math.cbrt(prime)));
  const hash = Int32Array.from(primes.slice(0, 8), (prime) => fraction(Math.sqrt(prime)));
  const padded = new Uint8Array(Math.ceil((message.length + 9) / 64) * 64);
  padded.set(message);
  padded[message.length] = 128;
  const view = new DataView(padded.buffer);
  view.setBigUint64(padded.length - 8, 8n * BigInt(message.length));
  const words = new Int32Array(64);
  const turned = (x, n) => (x >>> n) | (x << (32 - n));
  for (let block = 0; block < padded.length; block += 64) {
    for (let i = 0; i < 16; i++) words[i] = view.getInt32(block + 4 * i);
    for (let i = 16; i < 64; i++) {
      const [a, b] = [words[i - 15], words[i - 2]];
      words[i] =
        words[i - 16] +
        (turned(a, 7) ^ turned(a, 18) ^ (a >>> 3)) +
        words[i - 7] +
        (turned(b, 17) ^ turned(b, 19) ^ (b >>> 10));
    }
    let [a, b, c, d, e, f, g, h] = hash;
    for (let i = 0; i < 64; i++) {
      const first =
        (h + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) + ((e & f) ^ (~e & g)) + constants[i] + words[i]) | 0;
      const second = ((turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + first) | 0, c, b, a, (first + second) | 0];
    }
    [a, b, c, d, e, f, g, h].forEach((value, i) => (hash[i] += value));
  }
  const digest = new Uint8Array(32);
  hash.forEach((value, i) => new DataView(digest.buffer).setInt32(4 * i, value));
  return digest;
}

// --- Networks ---

// made by `make tables`: begin
const OPERATIONS = {
  conv: { number: 0, weight: "kernel", attributes: ["weight", "bias", "stride", "padding", "dilation", "groups"] },
  linear: { number: 1, weight: "matrix", attributes: ["weight", "bias"] },
  relu: { number: 2, weight: "", attributes: [] },
  clip: { number: 3, weight: "", attributes: ["low", "high"] },
  gelu: { number: 4, weight: "", attributes: [] },
  gelu_tanh: { number: 5, weight: "", attributes: [] },
  silu: { number: 6, weight: "", attributes: [] },
  sigmoid: { number: 7, weight: "", attributes: [] },
  tanh: { number: 8, weight: "", attributes: [] },
  hardswish: { number: 9, weight: "", attributes: [] },
  hardsigmoid: { number: 10, weight: "", attributes: [] },
  add: { number: 11, weight: "", attributes: [] },
  mul: { number: 12, weight: "", attributes: [] },
  scale: { number: 13, weight: "vector", attributes: ["weight", "bias"] },
  max_pool: { number: 14, weight: "", attributes: ["kernel", "stride", "padding", "ceil"] },
  avg_pool: { number: 15, weight: "", attributes: ["kernel", "stride", "padding", "ceil", "count_padding"] },
  mean: { number: 16, weight: "", attributes: [] },
  flatten: { number: 17, weight: "", attributes: [] },
  concat: { number: 18, weight: "", attributes: [] },
  upsample: { number: 19, weight: "", attributes: ["stride"] },
};
const ATTRIBUTES = {
  weight: { number: 0, kind: "tensor", least: 0 },
  bias: { number: 1, kind: "tensor", least: 0 },
  kernel: { number: 2, kind: "pair", least: 1 },
  stride: { number: 3, kind: "pair", least: 1 },
  padding: { number: 4, kind: "pair", least: 0 },
  dilation: { number: 5, kind: "pair", least: 1 },
  groups: { number: 6, kind: "integer", least: 1 },
  low: { number: 7, kind: "number", least: 0 },
  high: { number: 8, kind: "number", least: 0 },
  ceil: { number: 9, kind: "bool", least: 0 },
  count_padding: { number: 10, kind: "bool", least: 0 },
};
const INPUT_DTYPES = {
  float32: 0,
  int32: 1,
  int64: 2,
};
const DIMENSIONS = 4;
// made by `make tables`: end
const DENSE = { never: 1, always: 2 };

// Structs of pomona_net.h on wasm32: the first number is the size, the others are where the fields are, in bytes.
// The module has the same numbers (core/wasm/interface.cpp); instantiate() compares them.
const NODE = { size: 20, op: 0, first_operand: 4, num_operands: 8, first_attribute: 12, num_attributes: 16 };
const ATTRIBUTE = { size: 20, name: 0, value: 4 };
const TYPE = { size: 24, dtype: 0, rank: 4, dims: 8 };
const TENSOR = { size: 40, values: 0, columns: 4, starts: 8, rows: 16, cols: 24, num_values: 32 };
const GRAPH = {
  size: 48,
  inputs: 0,
  nodes: 4,
  operands: 8,
  attributes: 12,
  tensors: 16,
  outputs: 20,
  num_inputs: 24,
  num_nodes: 28,
  num_operands: 32,
  num_attributes: 36,
  num_tensors: 40,
  num_outputs: 44,
};
const OPTIONS = { size: 24, max_bytes: 0, micro_batch: 8, dense: 12, ranges: 16, num_ranges: 20 };
const INFO = { size: 32, activation_bytes: 0, weight_bytes: 8, macs: 16, dense_macs: 24 };
const ends = (records) => 1 + Math.max(...Object.values(records).map(({ number }) => number));
export const LAYOUT = [
  ends(OPERATIONS),
  ends(ATTRIBUTES),
  DIMENSIONS,
  ...[NODE, ATTRIBUTE, TYPE, TENSOR, GRAPH, OPTIONS, INFO].flatMap(Object.values),
];

// Arrays that inputs come in, by their dtype.
const ARRAYS = { float32: Float32Array, int32: Int32Array, int64: BigInt64Array };

const ERRORS = {
  "-2": "it needs more memory than maxBytes allows",
  "-4": "an operation, an operand, an attribute or a shape does not fit",
  "-5": "there is not enough memory",
};
const MAX_INT = 2 ** 31 - 1;
const MAX_OPERANDS = 4096;
const MAX_NODES = 65536;
const MAX_WINDOW = 65536;

let compiled; // the module, once for all networks

async function instantiate(wasm) {
  compiled ??= bytesOf(wasm ?? new URL("pomona.wasm", import.meta.url)).then((bytes) => WebAssembly.compile(bytes));
  const pending = compiled;
  const { exports } = await pending.then(
    (module) => WebAssembly.instantiate(module, {}),
    (error) => {
      if (compiled === pending) compiled = undefined; // the next call may have more luck
      throw error;
    },
  );
  const found = new Int32Array(exports.memory.buffer, exports.pomona_layout(), exports.pomona_layout_length());
  if (found.length !== LAYOUT.length || found.some((value, i) => value !== LAYOUT[i]))
    throw new Error("pomona.wasm and pomona.js are of different versions; build one with the other's source");
  return exports;
}

/** A network ready to run, in memory of its own. */
export class Network {
  #exports;
  #net;
  #capacity = 0; // samples that there is room for
  #inputs; // where they are, a place each
  #outputs;
  #pointers; // to all of them, as the engine takes them

  /** Shapes of one sample, and dtypes of the inputs: "float32", "int32" or "int64". */
  inputs;
  dtypes;
  outputs;
  /** Bytes of activations and of weights as laid out; multiplications of one sample: `macs` made, `denseMacs` of the
   * same network without zeros. */
  info;
  metadata;

  /** A network of what read() returned.
   *
   * dense: "never" or "always" runs layers so; by default the faster way is taken for each.
   * microBatch: samples that go through the network together; 0: as many as fit into the cache.
   * maxBytes: the most memory that weights and activations may take.
   * precision: "int16" computes in fixed point, faster; the file must have the ranges of values.
   * wasm: URL or bytes of pomona.wasm, if it is not in the folder of this file; the first one given serves for all. */
  static async from(file, { dense, microBatch = 0, maxBytes = MAX_BYTES, precision = "float32", wasm } = {}) {
    if (dense !== undefined && !Object.hasOwn(DENSE, dense))
      throw new Error(`dense must be "never", "always" or undefined, got ${short(dense)}`);
    whole("microBatch", microBatch, 0, MAX_INT);
    whole("maxBytes", maxBytes, 1, 2 ** 53 - 1);
    if (!["float32", "int16"].includes(precision))
      throw new Error(`precision must be "float32" or "int16", got ${short(precision)}`);
    if (!file.graph) throw new Error("the file has no graph: these are tensors, not a network that can be run");
    const network = new Network();
    network.#exports = await instantiate(wasm);
    network.metadata = file.metadata;
    network.#guarded(() => network.#build(file, [BigInt(maxBytes), microBatch, dense ? DENSE[dense] : 0], precision));
    return network;
  }

  /** Outputs of as many samples as the inputs hold, one after the other: a Float32Array, or an array of them where the
   * network has several outputs. Inputs are a Float32Array, an Int32Array or a BigInt64Array each, by their dtype. */
  run(...inputs) {
    if (!this.#net) throw new Error("the network had stopped before, by an error; load it again");
    if (inputs.length !== this.inputs.length)
      throw new Error(`the network takes ${this.inputs.length} inputs, got ${inputs.length}`);
    const batch = inputs[0].length / size(this.inputs[0]);
    inputs.forEach((input, i) => {
      const type = ARRAYS[this.dtypes[i]];
      if (!(input instanceof type)) throw new Error(`input ${i} must be a ${type.name}`);
      if (!Number.isInteger(batch) || input.length !== batch * size(this.inputs[i]))
        throw new Error(
          `input ${i} must hold whole samples of ${this.inputs[i].join(" x ")} numbers, as many as the others; ` +
            `got ${input.length} numbers`,
        );
    });
    return this.#guarded(() => {
      if (batch > this.#capacity) this.#makeRoom(batch);
      inputs.forEach((input, i) =>
        new ARRAYS[this.dtypes[i]](this.#exports.memory.buffer, this.#inputs[i], input.length).set(input),
      );
      const outputs = this.#pointers + 4 * inputs.length;
      this.#check(this.#exports.pomona_net_run(this.#net, BigInt(batch), this.#pointers, outputs, 1));
      const found = this.outputs.map((shape, i) => this.#floats(this.#outputs[i], batch * size(shape)).slice());
      return found.length === 1 ? found[0] : found;
    });
  }

  #floats(place, length) {
    return new Float32Array(this.#exports.memory.buffer, place, length);
  }

  #check(code) {
    if (code) throw new Error(ERRORS[code] ?? `the engine's error ${code}`);
  }

  /** Where memory runs out the engine stops for good, by an instruction that must not be reached. */
  #guarded(f) {
    try {
      return f();
    } catch (error) {
      if (!(error instanceof WebAssembly.RuntimeError)) throw error;
      this.#net = 0;
      const what = /unreachable/i.test(error.message)
        ? "there is not enough memory for the network"
        : `the engine failed: ${error.message}`;
      throw new Error(what, { cause: error });
    }
  }

  #allocate(bytes) {
    const place = this.#exports.malloc(bytes);
    if (!place) throw new Error(`there is not enough memory: ${bytes} bytes more are needed`);
    return place;
  }

  #makeRoom(batch) {
    const { free } = this.#exports;
    [...this.#inputs, ...this.#outputs].forEach(free);
    this.#capacity = 0;
    this.#inputs = this.#outputs = [];
    const places = [...this.inputs, ...this.outputs].map((shape, i) =>
      this.#allocate(ARRAYS[this.dtypes[i] ?? "float32"].BYTES_PER_ELEMENT * batch * size(shape)),
    );
    new Uint32Array(this.#exports.memory.buffer, this.#pointers, places.length).set(places);
    this.#inputs = places.slice(0, this.inputs.length);
    this.#outputs = places.slice(this.inputs.length);
    this.#capacity = batch;
  }

  #build(file, options, precision) {
    const exports = this.#exports;
    const graph = checkedGraph(file.graph);
    if (precision === "int16" && !graph.ranges)
      throw new Error('precision "int16" needs the ranges of values, which the file does not have: export it with calibrate=');
    const needed = neededTensors(graph, file.tensors);
    const held = []; // until the engine has its copy

    const place = (array) => {
      // An array's bytes, in the engine's memory.
      const at = this.#allocate(Math.max(array.byteLength, 1));
      held.push(at);
      new Uint8Array(exports.memory.buffer, at, array.byteLength).set(
        new Uint8Array(array.buffer, array.byteOffset, array.byteLength),
      );
      return at;
    };
    const structs = (layout, items, write) => {
      const view = new DataView(new ArrayBuffer(layout.size * items.length));
      items.forEach((item, i) =>
        write((field, value, k = 0) => {
          const at = i * layout.size + layout[field] + 4 * k;
          if (typeof value === "bigint") view.setBigInt64(at, value, true);
          else view.setInt32(at, value, true);
        }, item),
      );
      return place(view);
    };

    const operands = graph.nodes.flatMap((node) => node.operands);
    const settings = needed.nodes.flatMap((node) => Object.entries(node.attributes));
    let [first_operand, first_attribute] = [0, 0];
    const nodes = structs(NODE, needed.nodes, (set, node) => {
      const [num_operands, num_attributes] = [node.operands.length, Object.keys(node.attributes).length];
      set("op", OPERATIONS[node.name].number);
      Object.entries({ first_operand, num_operands, first_attribute, num_attributes }).forEach((entry) => set(...entry));
      first_operand += num_operands;
      first_attribute += num_attributes;
    });
    const attributes = structs(ATTRIBUTE, settings, (set, [name, value]) => {
      const { number, kind } = ATTRIBUTES[name];
      set("name", number);
      [value].flat().forEach((each, k) => set("value", kind === "number" ? patternOf(each) : Number(each), k));
    });
    const matrices = needed.matrices.map((matrix) => ({
      values: place(matrix.values),
      columns: matrix.columns ? place(matrix.columns) : 0,
      starts: matrix.starts ? place(matrix.starts) : 0,
      rows: BigInt(matrix.rows),
      cols: BigInt(matrix.cols),
      num_values: BigInt(matrix.values.length),
    }));
    const network = structs(
      GRAPH,
      [
        {
          inputs: structs(TYPE, graph.inputs, (set, { shape, dtype }) => {
            set("dtype", INPUT_DTYPES[dtype]);
            set("rank", shape.length);
            shape.forEach((dim, axis) => set("dims", dim, axis));
          }),
          nodes,
          operands: place(Int32Array.from(operands)),
          attributes,
          tensors: structs(TENSOR, matrices, (set, matrix) =>
            Object.entries(matrix).forEach((entry) => set(...entry)),
          ),
          outputs: place(Int32Array.from(graph.outputs)),
          num_inputs: graph.inputs.length,
          num_nodes: graph.nodes.length,
          num_operands: operands.length,
          num_attributes: settings.length,
          num_tensors: matrices.length,
          num_outputs: graph.outputs.length,
        },
      ],
      (set, fields) => Object.entries(fields).forEach((entry) => set(...entry)),
    );
    const [max_bytes, micro_batch, dense] = options;
    const most = precision === "int16" ? graph.ranges : [];
    const ranges = most.length ? place(Float32Array.from(most)) : 0;
    const how = structs(OPTIONS, [{ max_bytes, micro_batch, dense, ranges, num_ranges: most.length }], (set, fields) =>
      Object.entries(fields).forEach((entry) => set(...entry)),
    );
    const answer = place(new Int32Array([0, -1])); // the network, and the node that is wrong

    const code = exports.pomona_net_new(network, how, answer, answer + 4);
    const [net, bad] = new Int32Array(exports.memory.buffer, answer, 2);
    held.forEach(exports.free);
    if (code) {
      const where = graph.nodes[bad] ? `node ${bad} (${graph.nodes[bad].name}): ` : "the network: ";
      throw new Error(where + (ERRORS[code] ?? `the engine's error ${code}`));
    }
    this.#net = net;
    this.#describe(graph);
  }

  #describe(graph) {
    const exports = this.#exports;
    const place = this.#allocate(Math.max(TYPE.size, INFO.size));
    const shape = (value) => {
      this.#check(exports.pomona_net_type(this.#net, value, place));
      const [, rank, ...dims] = new Int32Array(exports.memory.buffer, place, 2 + DIMENSIONS);
      return dims.slice(0, rank);
    };
    this.inputs = graph.inputs.map((_, i) => shape(i));
    this.dtypes = graph.inputs.map(({ dtype }) => dtype);
    this.outputs = graph.outputs.map(shape);
    this.#check(exports.pomona_net_about(this.#net, place));
    const view = new DataView(exports.memory.buffer, place);
    const info = (field) => Number(view.getBigInt64(INFO[field], true));
    this.info = {
      activationBytes: info("activation_bytes"),
      weightBytes: info("weight_bytes"),
      macs: info("macs"),
      denseMacs: info("dense_macs"),
    };
    exports.free(place);
    this.#pointers = this.#allocate(4 * (this.inputs.length + this.outputs.length));
    this.#inputs = this.#outputs = [];
  }
}

/** The network of a file: of its URL, its bytes, or a Response. Options as of Network.from. */
export async function load(source, options = {}) {
  return Network.from(await read(source, options), options);
}

// --- Graphs ---

/** The graph of a file, of which nothing was checked so far but that it is JSON. Whether it fits together the engine
 * checks. */
function checkedGraph(graph) {
  if (!isObject(graph) || !["inputs,nodes,outputs", "inputs,nodes,outputs,ranges"].includes(Object.keys(graph).sort().join()))
    throw new Error(`a graph is a JSON object of inputs, nodes and outputs, got ${short(graph)}`);
  const inputs = list("inputs", graph.inputs, MAX_OPERANDS).map((input, i) => checkedInput(`input ${i}`, input));
  const nodes = list("nodes", graph.nodes, MAX_NODES).map((node, i) => {
    try {
      return checkedNode(node);
    } catch (error) {
      throw new Error(`node ${i}: ${error.message}`);
    }
  });
  let ranges;
  if (Object.hasOwn(graph, "ranges")) {
    ranges = list("ranges", graph.ranges, MAX_NODES + MAX_OPERANDS).map((most, i) => real(`the range of value ${i}`, most));
    if (ranges.length !== inputs.length + nodes.length)
      throw new Error(`there must be ${inputs.length + nodes.length} ranges, one for each value; got ${ranges.length}`);
    ranges.forEach((most, i) => {
      if (!(most >= 0 && most <= 1e18)) throw new Error(`the range of value ${i} must be in [0, 1e18], got ${most}`);
    });
  }
  return { inputs, nodes, outputs: integers("outputs", graph.outputs, 0), ranges };
}

function checkedInput(what, input) {
  const { shape, dtype } = isObject(input) ? input : { shape: input, dtype: "float32" };
  if (isObject(input) && Object.keys(input).sort().join() !== "dtype,shape")
    throw new Error(`${what} must be a shape, or an object of shape and dtype; got ${short(input)}`);
  if (typeof dtype !== "string" || !Object.hasOwn(INPUT_DTYPES, dtype))
    throw new Error(`the dtype of ${what} must be one of ${Object.keys(INPUT_DTYPES).join(", ")}, got ${short(dtype)}`);
  const dims = integers(what, shape, 1);
  if (dims.length < 1 || dims.length > DIMENSIONS)
    throw new Error(`${what} must have 1 to ${DIMENSIONS} dimensions, got ${short(shape)}`);
  return { shape: dims, dtype };
}

function checkedNode(node) {
  if (!Array.isArray(node) || node.length < 2 || node.length > 3 || typeof node[0] !== "string")
    throw new Error(`a node is [operation, operands] or [operation, operands, attributes], got ${short(node)}`);
  const [name, operands, given = {}] = node;
  if (!Object.hasOwn(OPERATIONS, name))
    throw new Error(`an operation is one of ${Object.keys(OPERATIONS).join(", ")}; got ${short(name)}`);
  if (!isObject(given)) throw new Error(`attributes of ${name} are a JSON object, got ${short(given)}`);
  const { attributes: known } = OPERATIONS[name];
  const attributes = {};
  for (const [attribute, value] of Object.entries(given)) {
    if (!known.includes(attribute))
      throw new Error(`${name} has no attribute ${short(attribute)}; it has: ${known.join(", ") || "none"}`);
    const { kind, least } = ATTRIBUTES[attribute];
    attributes[attribute] = READ[kind](`${name}'s ${attribute}`, value, least);
  }
  if (known.includes("weight") && attributes.weight === undefined) throw new Error(`${name} needs a weight`);
  checkWindow(attributes.kernel ?? [1, 1]);
  return { name, operands: integers(`${name}'s operands`, operands, 0), attributes };
}

function checkWindow(kernel) {
  if (kernel[0] * kernel[1] > MAX_WINDOW)
    throw new Error(`a kernel has at most ${MAX_WINDOW} elements, got ${short(kernel)}`);
}

const READ = {
  tensor: text,
  integer: (what, value, least) => whole(what, value, least, MAX_INT),
  pair,
  number: real,
  bool: truth,
};

/** Matrices that the nodes name, each once, and the nodes with their places; kernels of convolutions are added. */
function neededTensors(graph, tensors) {
  const matrices = [];
  const places = new Map();
  const index = (name, make) => {
    const key = `${make.name} ${name}`;
    if (!places.has(key)) places.set(key, matrices.push(make(name, tensorOf(name))) - 1);
    return places.get(key);
  };
  const tensorOf = (name) => {
    if (!tensors.has(name)) throw new Error(`there is no tensor ${short(name)}`);
    return tensors.get(name);
  };
  const nodes = graph.nodes.map((node) => {
    const attributes = { ...node.attributes };
    const { weight: form } = OPERATIONS[node.name];
    if (form === "kernel") attributes.kernel = kernelOf(attributes.weight, tensorOf(attributes.weight));
    for (const [name, value] of Object.entries(attributes))
      if (ATTRIBUTES[name].kind === "tensor")
        attributes[name] = index(value, name === "weight" && form !== "vector" ? matrix : vector);
    return { ...node, attributes };
  });
  return { nodes, matrices };
}

function kernelOf(name, { shape }) {
  if (shape.length !== 2 && shape.length !== 4)
    throw new Error(`${short(name)} must be (outputs, channels / groups, kh, kw), got ${short(shape)}`);
  const kernel = shape.length === 4 ? shape.slice(2) : [1, 1];
  checkWindow(kernel);
  return kernel;
}

/** (rows, the rest), sparse or dense. */
function matrix(name, tensor) {
  const { shape, positions } = tensor;
  const [rows] = shape;
  const all = size(shape);
  if (shape.length < 2 || all < 1 || all > MAX_INT)
    throw new Error(
      `${short(name)} must have two dimensions or more and 1 to ${MAX_INT} elements, got ${short(shape)}`,
    );
  const values = float32(name, tensor);
  const cols = all / rows;
  if (!positions) return { rows, cols, values };
  const columns = new Int32Array(positions.length);
  const starts = new Int32Array(2 * (rows + 1)); // of 64 bits, as the engine takes them; the upper half is zero
  for (let i = 0, row = 0; row < rows; row++) {
    for (; i < positions.length && positions[i] < (row + 1) * cols; i++) columns[i] = positions[i] - row * cols;
    starts[2 * (row + 1)] = i;
  }
  return { rows, cols, values, columns, starts };
}

/** Of one dimension; always dense. */
function vector(name, tensor) {
  const { shape, positions } = tensor;
  if (shape.length !== 1 || shape[0] > MAX_INT)
    throw new Error(`${short(name)} must have one dimension, got ${short(shape)}`);
  const found = float32(name, tensor);
  if (!positions) return { rows: shape[0], cols: 1, values: found };
  const values = new Float32Array(shape[0]);
  positions.forEach((position, i) => (values[position] = found[i]));
  return { rows: shape[0], cols: 1, values };
}

function float32(name, { dtype, values }) {
  if (!FLOATS.includes(dtype)) throw new Error(`${short(name)} must be of floats, got ${dtype}`);
  return values instanceof Float32Array ? values : Float32Array.from(values);
}

// --- Small ---

const size = (shape) => shape.reduce((a, b) => a * b, 1);
const sum = (items, f) => items.reduce((total, item) => total + f(item), 0);
const patternOf = (number) => new Int32Array(Float32Array.of(number).buffer)[0];
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

/** For messages: of any value, and never long. */
function short(value) {
  const text = isObject(value)
    ? "an object"
    : Array.isArray(value)
      ? `[${value.slice(0, 8).map((each) => (typeof each === "number" ? each : "..."))}]`
      : String(JSON.stringify(value));
  return text.length > 80 ? `${text.slice(0, 77)}...` : text;
}

function whole(what, value, least, most) {
  if (!Number.isInteger(value) || value < least || value > most)
    throw new Error(`${what} must be an integer in [${least}, ${most}], got ${short(value)}`);
  return value;
}

function list(what, value, most) {
  if (!Array.isArray(value) || value.length > most)
    throw new Error(`${what} must be a list of at most ${most}, got ${short(value)}`);
  return value;
}

const integers = (what, value, least) =>
  list(what, value, MAX_OPERANDS).map((each) => whole(what, each, least, MAX_INT));

function pair(what, value, least) {
  const both = integers(what, value, least);
  if (both.length !== 2) throw new Error(`${what} must be two integers, of height and width, got ${short(value)}`);
  return both;
}

function real(what, value) {
  if (typeof value !== "number" || !(Math.abs(value) <= 3.4e38))
    throw new Error(`${what} must be a number that float32 holds, got ${short(value)}`);
  return value;
}

function text(what, value) {
  if (typeof value !== "string") throw new Error(`${what} must be the name of a tensor, got ${short(value)}`);
  return value;
}

function truth(what, value) {
  if (typeof value !== "boolean") throw new Error(`${what} must be true or false, got ${short(value)}`);
  return value;
}
