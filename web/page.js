// The page: strokes to 28 x 28 pixels, pixels to an answer, and how long the answer takes.
import { Network, read } from "./pomona.js";

const FILE = "digits.pomona.safetensors";
const SIDE = 28; // of what the network sees, as MNIST makes its pictures:
const BOX = 20; // a digit fills this box,
const PEN = 2.4; // drawn with a pen as thick as this,
const FINE = 8; // each pixel the mean of so many squared; its centre of mass goes to the middle

const element = (id) => document.getElementById(id);
const pad = element("pad");
let strokes = []; // of points [x, y] in 0..1
let sparse, dense, normalise;

// --- From strokes to pixels ---

function drawStrokes(context, place, width) {
  context.lineWidth = width;
  context.lineCap = context.lineJoin = "round";
  context.beginPath();
  for (const stroke of strokes) {
    stroke.forEach((point, i) => (i ? context.lineTo(...place(point)) : context.moveTo(...place(point))));
    if (stroke.length === 1) context.lineTo(...place(stroke[0]));
  }
  context.stroke();
}

/** 28 * 28 numbers in 0..1, or null where nothing was drawn. */
function pixels() {
  const points = strokes.flat();
  if (!points.length) return null;
  const range = (axis) => {
    const values = points.map((point) => point[axis]);
    return [Math.min(...values), Math.max(...values)];
  };
  const [[left, right], [top, bottom]] = [range(0), range(1)];
  const scale = (BOX - PEN) / Math.max(right - left, bottom - top, 0.1); // a dot stays one
  const fine = document.createElement("canvas");
  fine.width = fine.height = SIDE * FINE;
  const context = fine.getContext("2d", { willReadFrequently: true });
  context.strokeStyle = "#fff";
  const draw = (dx, dy) => {
    context.clearRect(0, 0, fine.width, fine.height);
    const place = ([x, y]) => [
      (SIDE / 2 + (x - (left + right) / 2) * scale + dx) * FINE,
      (SIDE / 2 + (y - (top + bottom) / 2) * scale + dy) * FINE,
    ];
    drawStrokes(context, place, PEN * FINE);
    const alpha = context.getImageData(0, 0, fine.width, fine.height).data;
    const out = new Float32Array(SIDE * SIDE);
    for (let y = 0; y < SIDE * FINE; y++)
      for (let x = 0; x < SIDE * FINE; x++)
        out[((y / FINE) | 0) * SIDE + ((x / FINE) | 0)] += alpha[(y * SIDE * FINE + x) * 4 + 3] / (255 * FINE * FINE);
    return out;
  };
  const first = draw(0, 0);
  let mass = 0,
    x = 0,
    y = 0;
  first.forEach((value, i) => {
    mass += value;
    x += value * ((i % SIDE) + 0.5);
    y += value * (((i / SIDE) | 0) + 0.5);
  });
  return mass ? draw(SIDE / 2 - x / mass, SIDE / 2 - y / mass) : null;
}

// --- The pad ---

function repaint() {
  const size = Math.round(pad.clientWidth * devicePixelRatio);
  if (pad.width !== size) pad.width = pad.height = size;
  const context = pad.getContext("2d");
  context.clearRect(0, 0, size, size);
  context.strokeStyle = getComputedStyle(pad).color;
  drawStrokes(context, ([x, y]) => [x * size, y * size], size / 14);
  element("hint").style.opacity = strokes.length ? 0 : 1;
}

let isPlanned = false;
function changed() {
  if (isPlanned) return;
  isPlanned = true;
  requestAnimationFrame(() => {
    isPlanned = false;
    repaint();
    answer();
  });
}

function listen() {
  let pen = null; // the pointer that draws; a second finger does not
  const point = (event) => {
    const { left, top, width } = pad.getBoundingClientRect();
    return [
      (event.clientX - left - pad.clientLeft) / (width - 2 * pad.clientLeft),
      (event.clientY - top - pad.clientTop) / (width - 2 * pad.clientTop),
    ];
  };
  pad.addEventListener("pointerdown", (event) => {
    if (pen !== null || event.button) return;
    event.preventDefault();
    example?.abort();
    pen = event.pointerId;
    pad.setPointerCapture(pen);
    strokes.push([point(event)]);
    changed();
  });
  pad.addEventListener("pointermove", (event) => {
    if (event.pointerId !== pen) return;
    const events = event.getCoalescedEvents?.() ?? [];
    for (const each of events.length ? events : [event]) strokes.at(-1).push(point(each));
    changed();
  });
  for (const name of ["pointerup", "pointercancel"])
    pad.addEventListener(name, (event) => {
      if (event.pointerId === pen) pen = null;
    });
  element("clear").addEventListener("click", () => {
    example?.abort();
    strokes = [];
    changed();
  });
  element("example").addEventListener("click", drawExample);
  new ResizeObserver(repaint).observe(pad);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
}

// Digits as a hand draws them: strokes of corners, rounded by a spline.
const EXAMPLES = [
  [
    [
      [0.5, 0.2],
      [0.33, 0.32],
      [0.3, 0.55],
      [0.4, 0.78],
      [0.55, 0.8],
      [0.68, 0.65],
      [0.68, 0.4],
      [0.6, 0.23],
      [0.48, 0.2],
    ],
  ],
  [
    [
      [0.53, 0.2],
      [0.5, 0.5],
      [0.47, 0.8],
    ],
  ],
  [
    [
      [0.32, 0.35],
      [0.4, 0.22],
      [0.56, 0.2],
      [0.66, 0.33],
      [0.58, 0.52],
      [0.42, 0.68],
      [0.3, 0.79],
      [0.48, 0.78],
      [0.7, 0.78],
    ],
  ],
  [
    [
      [0.34, 0.26],
      [0.48, 0.19],
      [0.63, 0.26],
      [0.62, 0.4],
      [0.47, 0.48],
      [0.63, 0.54],
      [0.67, 0.68],
      [0.55, 0.8],
      [0.35, 0.76],
    ],
  ],
  [
    [
      [0.38, 0.2],
      [0.34, 0.36],
      [0.32, 0.52],
      [0.48, 0.53],
      [0.68, 0.51],
    ],
    [
      [0.61, 0.22],
      [0.6, 0.5],
      [0.58, 0.82],
    ],
  ],
  [
    [
      [0.67, 0.2],
      [0.53, 0.2],
      [0.39, 0.21],
      [0.38, 0.34],
      [0.36, 0.46],
      [0.52, 0.43],
      [0.66, 0.54],
      [0.64, 0.72],
      [0.5, 0.81],
      [0.34, 0.75],
    ],
  ],
  [
    [
      [0.6, 0.18],
      [0.44, 0.34],
      [0.36, 0.56],
      [0.4, 0.75],
      [0.54, 0.81],
      [0.65, 0.7],
      [0.6, 0.56],
      [0.47, 0.55],
      [0.38, 0.66],
    ],
  ],
  [
    [
      [0.31, 0.23],
      [0.5, 0.23],
      [0.69, 0.22],
      [0.6, 0.4],
      [0.53, 0.58],
      [0.47, 0.81],
    ],
  ],
  [
    [
      [0.62, 0.27],
      [0.5, 0.19],
      [0.38, 0.27],
      [0.42, 0.41],
      [0.55, 0.52],
      [0.64, 0.66],
      [0.55, 0.8],
      [0.41, 0.78],
      [0.36, 0.64],
      [0.46, 0.5],
      [0.58, 0.4],
      [0.63, 0.27],
    ],
  ],
  [
    [
      [0.64, 0.3],
      [0.52, 0.2],
      [0.38, 0.28],
      [0.38, 0.43],
      [0.5, 0.5],
      [0.62, 0.42],
      [0.65, 0.28],
      [0.64, 0.5],
      [0.59, 0.81],
    ],
  ],
];
let example = null;
let nextExample = 3;

/** Points along a Catmull-Rom spline. */
function* rounded(corners) {
  const at = (i) => corners[Math.min(Math.max(i, 0), corners.length - 1)];
  for (let i = 0; i + 1 < corners.length; i++)
    for (let t = 0; t < 1; t += 0.125)
      yield [0, 1].map((axis) => {
        const [a, b, c, d] = [-1, 0, 1, 2].map((k) => at(i + k)[axis]);
        return b + (t / 2) * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)));
      });
  yield corners.at(-1);
}

async function drawExample() {
  example?.abort();
  const own = (example = new AbortController());
  strokes = [];
  const corners = EXAMPLES[nextExample];
  nextExample = (nextExample + 7) % 10; // every digit, in no obvious order
  const isStill = matchMedia("(prefers-reduced-motion: reduce)").matches;
  for (const stroke of corners) {
    strokes.push([]);
    for (const point of rounded(stroke)) {
      if (own.signal.aborted) return;
      strokes.at(-1).push(point);
      changed();
      if (!isStill) await new Promise(requestAnimationFrame);
    }
  }
}

// --- The answer ---

function softmax(logits) {
  const most = Math.max(...logits);
  const shares = Array.from(logits, (value) => Math.exp(value - most));
  const sum = shares.reduce((a, b) => a + b);
  return shares.map((share) => share / sum);
}

const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;

function answer() {
  const seen = pixels();
  const shares = seen ? softmax(sparse.run(seen.map(normalise))) : new Array(10).fill(0);
  const best = seen ? shares.indexOf(Math.max(...shares)) : -1;
  element("digit").textContent = seen ? best : "\u00a0";
  [...element("bars").children].forEach((row, digit) => {
    row.classList.toggle("best", digit === best);
    row.style.setProperty("--share", shares[digit]);
    row.querySelector(".share").textContent = seen ? percent(shares[digit]) : "";
  });
  const image = new ImageData(SIDE, SIDE);
  for (let i = 0; i < SIDE * SIDE; i++) image.data.set([255, 255, 255, seen ? 255 * seen[i] : 0], 4 * i);
  element("seen").getContext("2d").putImageData(image, 0, 0);
}

// --- Latency ---

const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];

/** Milliseconds a run takes. Browsers' clocks may tick once a millisecond only: many runs are timed at once. */
function time(network, input, least) {
  for (let repeats = 1; ; repeats *= 2) {
    const start = performance.now();
    for (let i = 0; i < repeats; i++) network.run(input);
    const spent = performance.now() - start;
    if (spent >= least) return spent / repeats;
  }
}

async function race() {
  const input = new Float32Array(SIDE * SIDE).map((_, i) => normalise(i % SIDE === SIDE / 2 ? 1 : 0)); // a 1
  const times = [[], []];
  for (let round = -5; round < 15; round++) {
    // The first rounds do not count: browsers compile again what runs often.
    for (const [i, network] of [sparse, dense].entries()) {
      const spent = time(network, input, round < 0 ? 20 : 8);
      if (round >= 0) times[i].push(spent);
      await new Promise((done) => setTimeout(done)); // for what is being drawn meanwhile
    }
    if (round >= 0) showRace(...times.map((each) => median([...each])));
  }
}

function microseconds(milliseconds) {
  const value = 1000 * milliseconds;
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} \u00b5s`;
}

function showRace(quick, slow) {
  const longest = Math.max(quick, slow);
  for (const [name, value] of [
    ["sparse", quick],
    ["dense", slow],
  ]) {
    element(name).textContent = microseconds(value);
    element(`${name}-bar`).style.width = `${(100 * value) / longest}%`;
  }
  const ratio = slow / quick;
  element("faster").textContent =
    `${ratio.toFixed(1)} times as fast where zeros are skipped. One digit, one thread, on this device.`;
}

// --- The network itself ---

const count = (value) => value.toLocaleString("en");

function figure(name, value, note) {
  const cell = document.createElement("div");
  for (const [tag, text] of [
    ["dt", name],
    ["dd", value],
  ]) {
    const part = document.createElement(tag);
    part.textContent = text;
    cell.append(part);
  }
  if (note) {
    const small = document.createElement("small");
    small.textContent = note;
    cell.lastChild.append(small);
  }
  element("figures").append(cell);
}

/** One dot for each weight that is not zero, of the layer with the most weights. */
function paintLeft(tensors) {
  const [name, largest] = [...tensors]
    .filter(([, tensor]) => tensor.shape.length > 1 && tensor.positions)
    .reduce((a, b) => (size(b[1]) > size(a[1]) ? b : a));
  const rows = largest.shape[0];
  const columns = size(largest) / rows;
  const canvas = element("left");
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const most = largest.values.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
  largest.positions.forEach((position, i) => {
    const value = largest.values[i];
    context.fillStyle = value > 0 ? "#56b4e9" : "#e69f00";
    context.globalAlpha = 0.35 + 0.65 * Math.sqrt(Math.abs(value) / most);
    context.beginPath();
    context.arc((position % columns) + 0.5, Math.floor(position / columns) + 0.5, 2.2, 0, 7);
    context.fill();
  });
  element("caption").textContent =
    `${name}: of ${count(rows)} x ${count(columns)} weights ${count(largest.values.length)} are left, ` +
    "blue where positive, orange where negative.";
}

const size = (tensor) => tensor.shape.reduce((a, b) => a * b, 1);
const kilobytes = (bytes) => `${bytes < 10000 ? (bytes / 1000).toFixed(1) : count(Math.round(bytes / 1000))} KB`;

function describe(file, bytes) {
  const { metadata, tensors } = file;
  const all = [...tensors.values()];
  const weights = all.filter((tensor) => tensor.shape.length > 1);
  const total = weights.reduce((sum, tensor) => sum + size(tensor), 0);
  const kept = weights.reduce((sum, tensor) => sum + tensor.values.filter((value) => value !== 0).length, 0);
  const plain = 4 * all.reduce((sum, tensor) => sum + size(tensor), 0);
  element("about").textContent =
    `A neural network of ${kilobytes(bytes)} reads it. ${percent(1 - kept / total)} of its weights are zero.`;
  figure("file", kilobytes(bytes), `${kilobytes(plain)} as plain float32`);
  figure("weights", count(kept), `of ${count(total)}`);
  figure("multiplications", count(sparse.info.macs), `of ${count(sparse.info.denseMacs)} a digit`);
  figure("accuracy", `${Number(metadata.accuracy_after).toFixed(2)}\u00a0%`, "of test digits read right");
  element("source").textContent =
    `${metadata.title} (${metadata.source}), seed ${metadata.seed}, on ${metadata.data}; weights share values ` +
    `(${metadata.quantize}; ${Number(metadata.accuracy_before).toFixed(2)} % before). What you draw stays here.`;
}

async function start() {
  const bars = Array.from({ length: 10 }, (_, digit) => {
    const row = document.createElement("li");
    row.innerHTML = `<span>${digit}</span><span class="track"><span></span></span><span class="share"></span>`;
    return row;
  });
  element("bars").append(...bars);
  const response = await fetch(FILE);
  if (!response.ok) throw new Error(`${FILE} cannot be had: ${response.status}`);
  const bytes = await response.arrayBuffer();
  const file = await read(bytes);
  [sparse, dense] = await Promise.all([Network.from(file), Network.from(file, { dense: "always" })]);
  const { mean, std } = file.metadata;
  normalise = (value) => (value - mean) / std;
  describe(file, bytes.byteLength);
  paintLeft(file.tensors);
  listen();
  for (const id of ["clear", "example"]) element(id).disabled = false;
  changed();
  await race();
  document.body.dataset.state = "ready";
}

start().catch((error) => {
  const about = element("about");
  about.textContent = `This does not work here: ${error.message}`;
  about.className = "error";
  document.body.dataset.state = "failed";
  throw error;
});
