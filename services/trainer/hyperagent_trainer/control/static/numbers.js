// Formats numbers and durations, and reduces many points for drawing. A point is [step, value]; a value of null is a
// gap, where the measured number was not finite.

export function number(value, digits = 4) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) {
    const [mantissa, exponent] = value.toExponential(2).split("e");
    return `${Number(mantissa)}e${Number(exponent)}`;
  }
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
}

export function duration(seconds) {
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const first = units.findIndex(([, size]) => seconds >= size);
  if (first < 0) return "less than a second";
  let rest = Math.round(seconds);
  const parts = [];
  for (const [name, size] of units.slice(first, first + 2)) {
    const count = Math.floor(rest / size);
    rest -= count * size;
    if (count) parts.push(`${count} ${name}`);
  }
  return parts.join(" ");
}

// Return about `count` round numbers from low to high; integers if `smallest` is 1.
export function ticks(low, high, count, smallest = 0) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const factors = smallest && power < 10 ? [1, 2, 5, 10] : [1, 2, 2.5, 5, 10];
  const step = Math.max(smallest, power * factors.find((factor) => factor * power >= rough));
  const found = [];
  // Multiplied, not accumulated, so that 0.3 does not become 0.30000000000000004.
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

// Return at most about `count` powers of ten from low to high.
export function decades(low, high, count) {
  const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
  const stride = Math.max(1, Math.ceil((last - first + 1) / count));
  const found = [];
  for (let power = first; power <= last; power += stride) found.push(10 ** power);
  return found;
}

// Return at most `most` of the points, keeping the lowest and the highest of each stretch so that no spike is lost.
export function thinned(points, most) {
  if (points.length <= most) return points;
  const kept = [];
  for (const [from, to] of stretches(points.length, Math.floor(most / 2))) {
    let low = -1, high = -1;
    for (let at = from; at < to; at++) {
      const y = points[at][1];
      if (y === null) continue;
      if (low < 0 || y < points[low][1]) low = at;
      if (high < 0 || y > points[high][1]) high = at;
    }
    if (low < 0) kept.push(points[from]);
    else for (const at of new Set([Math.min(low, high), Math.max(low, high)])) kept.push(points[at]);
  }
  return kept;
}

// Return the mean of each stretch of the points; the geometric mean on a logarithmic scale.
export function means(points, count, isLog) {
  const found = [];
  for (const [from, to] of stretches(points.length, count)) {
    let steps = 0, sum = 0, num = 0;
    for (let at = from; at < to; at++) {
      const [step, y] = points[at];
      steps += step;
      if (y === null || (isLog && y <= 0)) continue;
      sum += isLog ? Math.log(y) : y;
      num++;
    }
    const mean = sum / num;
    found.push([steps / (to - from), num ? (isLog ? Math.exp(mean) : mean) : null]);
  }
  return found;
}

function* stretches(length, count) {
  for (let i = 0; i < count; i++) yield [Math.floor((i * length) / count), Math.floor(((i + 1) * length) / count)];
}
