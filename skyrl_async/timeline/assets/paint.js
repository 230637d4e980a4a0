// From lanes to pixels. Whatever is smaller than a pixel is averaged into it.

const dark = matchMedia("(prefers-color-scheme: dark)");

function themeColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function rgb(hex) { return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)); }

const scratch = {width: 0};

function accumulators(width) {
  if (scratch.width !== width) {
    scratch.width = width;
    for (const name of ["red", "green", "blue", "cover"]) scratch[name] = new Float32Array(width);
    scratch.pixels = new Uint32Array(width);
  }
  for (const name of ["red", "green", "blue", "cover"]) scratch[name].fill(0);
  return scratch;
}

// Call visit(pixel, part of it that is covered, name) for all spans of a level in the window.
function coverage(level, window, width, visit, whole) {
  const scale = width / (window.end - window.start);
  for (let i = firstAfter(level, window.start); i < level.size; i += 1) {
    if (level.start[i] >= window.end) break;
    const left = Math.max(0, (level.start[i] - window.start) * scale);
    const right = Math.min(width, (level.end[i] - window.start) * scale);
    const first = Math.floor(left), last = Math.min(width - 1, Math.floor(right));
    const name = level.name[i];
    if (first >= last) {
      if (first < width) visit(first, Math.max(right - left, 0.02), name);
      continue;
    }
    visit(first, first + 1 - left, name);
    if (last > first + 1) whole(first + 1, last, name);
    visit(last, right - last, name);
  }
}

// Colors of one row of pixels.
function paintLevel(level, window, width, ground) {
  const {red, green, blue, cover, pixels} = accumulators(width);
  const visit = (x, part, name) => {
    const color = rgbOfName[name];
    red[x] += part * color[0]; green[x] += part * color[1]; blue[x] += part * color[2];
    cover[x] += part;
  };
  const whole = (from, to, name) => {
    const color = rgbOfName[name];
    red.fill(color[0], from, to); green.fill(color[1], from, to); blue.fill(color[2], from, to);
    cover.fill(1, from, to);
  };
  coverage(level, window, width, visit, whole);
  scratch.colored = 0;
  for (let x = 0; x < width; x += 1) {
    const most = Math.max(1, cover[x]), rest = Math.max(0, 1 - cover[x]);
    if (rest < 1) scratch.colored += 1;
    pixels[x] = 0xff000000
      | ((blue[x] / most + rest * ground[2]) << 16)
      | ((green[x] / most + rest * ground[1]) << 8)
      | (red[x] / most + rest * ground[0]);
  }
  return pixels;
}

// Dark edges between spans that are wide enough to be told apart.
function paintEdges(level, window, pixels, width) {
  const scale = width / (window.end - window.start);
  for (let i = firstAfter(level, window.start); i < level.size; i += 1) {
    if (level.start[i] >= window.end) break;
    const x = Math.floor((level.start[i] - window.start) * scale);
    if (x < 0 || x >= width || (level.end[i] - level.start[i]) * scale < 4) continue;
    const p = pixels[x];
    pixels[x] = 0xff000000 | (((p >> 16) & 255) * 0.72 << 16) | (((p >> 8) & 255) * 0.72 << 8)
      | ((p & 255) * 0.72);
  }
}

function fillRow(image, pixels, left, top, height) {
  const out = image.words, full = image.width;
  const from = Math.max(0, top), to = Math.min(image.height, top + height);
  for (let y = from; y < to; y += 1) out.set(pixels, y * full + left);
}

// How many slots of a process do what, over time, as a stack with the work at the bottom.
const ORDER = ["generate", "environment", "other", "wait_engine", "wait_group"];

function paintBand(slots, window, width, image, left, top, height, ground) {
  const stacks = new Map();
  for (const lane of slots) {
    for (const level of lane.levels) {
      const stackOf = (name) => {
        if (!stacks.has(name)) stacks.set(name, new Float32Array(width));
        return stacks.get(name);
      };
      coverage(level, window, width, (x, part, name) => { stackOf(name)[x] += part; },
        (from, to, name) => { const s = stackOf(name); for (let x = from; x < to; x += 1) s[x] += 1; });
    }
  }
  const place = (name) => (ORDER.indexOf(data.names[name]) + 1 || 99);
  const names = [...stacks.keys()].sort((a, b) => place(a) - place(b));
  const word = (c) => 0xff000000 | (c[2] << 16) | (c[1] << 8) | c[0];
  const back = word(ground), out = image.words, full = image.width;
  const scale = height / slots.length;
  for (let x = 0; x < width; x += 1) {
    let y = top + height, sum = 0;
    for (const name of names) {
      sum += stacks.get(name)[x];
      const upper = Math.round(top + height - Math.min(sum, slots.length) * scale);
      const color = word(rgbOfName[name]);
      for (; y > upper; y -= 1) if (y - 1 >= 0 && y <= image.height) out[(y - 1) * full + left + x] = color;
    }
    for (; y > top; y -= 1) if (y - 1 >= 0 && y <= image.height) out[(y - 1) * full + left + x] = back;
  }
}

// Time of each name in the window, without that of spans inside; the last is of no span.
function ownTime(lane, window) {
  const none = data.names.length, own = new Float64Array(none + 1);
  own[none] = window.end - window.start;
  for (const level of lane.levels) {
    for (let i = firstAfter(level, window.start); i < level.size; i += 1) {
      if (level.start[i] >= window.end) break;
      const part = Math.min(level.end[i], window.end) - Math.max(level.start[i], window.start);
      own[level.name[i]] += part;
      own[level.outer[i] < 0 ? none : level.outer[i]] -= part;
    }
  }
  return own.map((time) => Math.max(0, time));
}
