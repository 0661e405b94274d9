// Numbers and times for people.

export function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return value.toExponential(2).replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
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

// Round numbers from low to high, about `count` of them; whole ones if `smallest` is 1.
export function ticks(low, high, count, smallest = 0) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const factors = smallest && power < 10 ? [1, 2, 5, 10] : [1, 2, 2.5, 5, 10];
  const step = Math.max(smallest, power * factors.find((factor) => factor * power >= rough));
  const found = [];
  // Counted, not added up, so that 0.3 does not become 0.30000000000000004.
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

// At most `most` of the points; of each stretch the lowest and the highest stay, so that no spike is lost.
export function thinned(points, most) {
  if (points.length <= most) return points;
  const stretches = Math.floor(most / 2);
  const kept = [];
  for (let i = 0; i < stretches; i++) {
    const stretch = points.slice(Math.floor((i * points.length) / stretches), Math.floor(((i + 1) * points.length) / stretches));
    let low = 0, high = 0;
    stretch.forEach(([, y], at) => {
      if (y < stretch[low][1]) low = at;
      if (y > stretch[high][1]) high = at;
    });
    for (const at of new Set([Math.min(low, high), Math.max(low, high)])) kept.push(stretch[at]);
  }
  return kept;
}

// The mean of each of so many stretches of the points.
export function means(points, count) {
  return Array.from({ length: count }, (_, i) => {
    const stretch = points.slice(Math.floor((i * points.length) / count), Math.floor(((i + 1) * points.length) / count));
    const mean = (axis) => stretch.reduce((sum, point) => sum + point[axis], 0) / stretch.length;
    return [mean(0), mean(1)];
  });
}
