// Draws the curves from the JSON beside it, and searches the arguments. Text of the data only ever becomes text nodes.
(() => {
  const { charts, tables, marks } = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const whole = new Intl.NumberFormat("en");
  let smoothing = 40, log = false, cursor = null; // parts of the run that smoothing looks over; a step

  function make(tag, name, text) {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function draw(parent, tag, attributes, text) {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  }

  // four digits, and as many more as a whole number has
  function shown(value) {
    if (value === null || value === undefined) return "none";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-2 || size >= 1e9)) return value.toExponential(3).replace(/\.?0+e/, "e").replace("e+", "e");
    return size >= 1000 ? whole.format(Math.round(value)) : String(+value.toPrecision(4));
  }

  // the same memory and the same two directions as the curve in loss.png (callbacks/curve.py)
  function smooth(values, parts) {
    const there = values.flatMap((value, i) => (value === null ? [] : [i]));
    const decay = 1 - 1 / Math.max(1, there.length / parts);
    if (decay === 0) return values;
    const out = values.map(() => null);
    const pass = (order) => {
      let mean = 0, weight = 0;
      for (const i of order) {
        mean = decay * mean + (1 - decay) * values[i];
        weight = decay * weight + (1 - decay);
        out[i] += mean / weight / 2;
      }
    };
    pass(there);
    pass(there.slice().reverse());
    return out;
  }

  function roundStep(span, parts) {
    const exact = span / parts, power = 10 ** Math.floor(Math.log10(exact));
    return [1, 2, 5, 10].find((factor) => factor * power >= exact * (1 - 1e-9)) * power;
  }

  function linearTicks(low, high, parts) {
    const step = roundStep(high - low, parts), ticks = [];
    for (let at = Math.ceil(low / step - 1e-9); at * step <= high * (1 + 1e-12) + step * 1e-9; at++) ticks.push(+(at * step).toPrecision(12));
    return ticks;
  }

  function logTicks(low, high) {
    const decades = Math.log10(high / low), ticks = [];
    const factors = decades < 1.5 ? [1, 2, 3, 5, 7] : decades < 4 ? [1, 2, 5] : [1];
    const every = Math.max(1, Math.ceil(decades / 8));
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += every)
      for (const factor of factors) {
        const tick = +(factor * 10 ** power).toPrecision(12);
        if (tick >= low * (1 - 1e-9) && tick <= high * (1 + 1e-9)) ticks.push(tick);
      }
    return ticks.length > 1 ? ticks : [low, high];
  }

  const ends = Object.values(tables).filter((table) => table.first.length);
  const first = Math.min(...ends.map((table) => table.first[0]));
  const last = Math.max(...ends.map((table) => table.last.at(-1)));

  // ---- one chart
  function chart(spec, index) {
    const figure = document.getElementById("chart-" + index);
    const plot = figure.querySelector(".plot"), readout = figure.querySelector(".readout");
    const lines = spec.lines.map((line, i) => {
      const { first, last, columns } = tables[line.table], column = columns[line.key];
      const scaled = (values) => values.map((value) => (value === null ? null : value * spec.factor));
      const mean = scaled(column.mean);
      return {
        name: line.name, first, last, mean, low: column.low ? scaled(column.low) : mean,
        high: column.high ? scaled(column.high) : mean, exact: !column.low, css: "ab"[i], marked: line.table === "eval",
        at: first.map((step, row) => (step + last[row]) / 2), smoothed: mean,
      };
    });
    const main = lines[0];
    let place = null, overlay = null;

    function domain() {
      let low = Infinity, high = -Infinity;
      for (const line of lines)
        for (const values of [line.low, line.high])
          for (const value of values) {
            if (value === null || (log && value <= 0)) continue;
            if (value < low) low = value;
            if (value > high) high = value;
          }
      if (low > high) return null;
      if (log) return low === high ? [low / 2, high * 2] : [low, high];
      if (spec.zero && low > 0) low = 0;
      if (low === high && spec.zero && low === 0) return [0, 1];
      if (low === high) return [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
      const room = (high - low) * 0.04;
      return [spec.zero && low === 0 ? 0 : low - room, high + room];
    }

    function render() {
      for (const line of lines) line.smoothed = line.marked || !spec.smooth || !smoothing ? line.mean : smooth(line.mean, smoothing);
      const width = plot.clientWidth, height = index === 0 ? 320 : 220;
      const range = domain();
      plot.replaceChildren();
      const svg = draw(plot, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": summary() });
      if (!range) {
        draw(svg, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, log ? "nothing above 0" : "no numbers");
        place = null;
        return;
      }
      const ticks = log ? logTicks(...range) : linearTicks(...range, height / 55);
      const left = Math.max(...ticks.map((tick) => shown(tick).length)) * 7 + 12, right = width - 14;
      const top = 10, bottom = height - 42, [low, high] = range;
      const span = Math.max(1, last - first);
      const x = (step) => left + ((right - left) * (last === first ? 0.5 : (step - first) / span));
      const y = log
        ? (value) => bottom - ((bottom - top) * Math.log(value / low)) / Math.log(high / low)
        : (value) => bottom - ((bottom - top) * (value - low)) / (high - low);
      const drawn = (value) => value !== null && (!log || value > 0);
      place = { x, y, left, right, top, bottom, drawn, step: (at) => first + ((at - left) / (right - left)) * span };

      for (const tick of ticks) {
        draw(svg, "line", { class: "grid", x1: left, x2: right, y1: y(tick), y2: y(tick) });
        draw(svg, "text", { x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, shown(tick));
      }
      const steps = last === first ? [first] : linearTicks(first, last, Math.min(8, width / 80)).filter(Number.isInteger);
      for (const step of steps) {
        const text = whole.format(step), half = text.length * 3.6;
        draw(svg, "text", { x: Math.min(x(step), width - half), y: bottom + 19, "text-anchor": "middle" }, text);
      }
      draw(svg, "line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom });
      draw(svg, "text", { x: (left + right) / 2, y: height - 5, "text-anchor": "middle" }, "optimizer step");
      for (const step of marks.resumed) {
        if (step < first || step > last) continue;
        const line = draw(svg, "line", { class: "resumed", x1: x(step), x2: x(step), y1: top, y2: bottom });
        draw(line, "title", {}, "resumed at step " + whole.format(step));
      }
      for (const step of marks.saved) {
        if (step < first || step > last) continue;
        const at = x(step), mark = draw(svg, "path", { class: "saved", d: `M${at - 4} ${bottom + 8}L${at + 4} ${bottom + 8}L${at} ${bottom + 1}Z` });
        draw(mark, "title", {}, "checkpoint of step " + whole.format(step));
      }
      for (const line of lines) {
        const dense = line.at.length > 60;
        if (!line.exact) band(svg, line);
        else if (line.smoothed !== line.mean) trace(svg, "raw", line, line.mean);
        trace(svg, "smooth", line, line.smoothed);
        if ((line.marked && !dense) || line.at.length === 1)
          line.mean.forEach((value, i) => {
            if (drawn(value)) draw(svg, "circle", { class: "dot " + line.css, cx: x(line.at[i]), cy: y(value), r: 3.5 });
          });
      }
      overlay = draw(svg, "g", { "pointer-events": "none" });
      point();
    }

    // a line for each run of numbers: where one is missing there is a gap
    function trace(svg, kind, line, values) {
      let points = [];
      const flush = () => {
        if (points.length) draw(svg, "polyline", { class: `${kind} ${line.css}`, points: points.join(" ") });
        points = [];
      };
      values.forEach((value, i) => {
        if (place.drawn(value)) points.push(place.x(line.at[i]).toFixed(2) + "," + place.y(value).toFixed(2));
        else flush();
      });
      flush();
    }

    function band(svg, line) {
      const there = line.low.flatMap((value, i) => (place.drawn(value) ? [i] : []));
      const edge = (values) => (i) => place.x(line.at[i]).toFixed(2) + "," + place.y(values[i]).toFixed(2);
      const points = [...there.map(edge(line.high)), ...there.slice().reverse().map(edge(line.low))];
      draw(svg, "polygon", { class: "band " + line.css, points: points.join(" ") });
    }

    function nearest(line, step) {
      let low = 0, high = line.at.length - 1;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (line.at[middle] < step) low = middle + 1;
        else high = middle;
      }
      return low > 0 && step - line.at[low - 1] <= line.at[low] - step ? low - 1 : low;
    }

    const steps = (line, i) =>
      line.first[i] === line.last[i] ? `step ${whole.format(line.first[i])}`
        : `steps ${whole.format(line.first[i])} to ${whole.format(line.last[i])}`;

    function point() {
      const step = cursor === null ? last : cursor;
      const parts = [make("b", "", steps(main, nearest(main, step)))];
      if (overlay) overlay.replaceChildren();
      for (const line of lines) {
        const i = nearest(line, step), value = line.mean[i];
        let told = shown(value);
        if (!line.exact && value !== null) told += ` (${shown(line.low[i])} to ${shown(line.high[i])})`;
        if (line !== main && line.at[i] !== main.at[nearest(main, step)]) told += ` at ${steps(line, i)}`;
        if (line.smoothed !== line.mean && value !== null) told += `, smoothed ${shown(line.smoothed[i])}`;
        parts.push(" ", make("i", line.css), [line.name, told].join(" ").trim());
        if (overlay && place && cursor !== null && place.drawn(value))
          draw(overlay, "circle", { class: "dot " + line.css, cx: place.x(line.at[i]), cy: place.y(value), r: 4 });
      }
      if (overlay && place && cursor !== null) {
        const at = place.x(main.at[nearest(main, cursor)]);
        overlay.prepend(draw(overlay, "line", { class: "cursor", x1: at, x2: at, y1: place.top, y2: place.bottom }));
      }
      readout.replaceChildren(...parts);
    }

    function summary() {
      return lines.map((line) => {
        const values = line.mean.filter((value) => value !== null);
        if (!values.length) return line.name + ": no numbers";
        const low = line.low.reduce((a, b) => (b !== null && b < a ? b : a), Infinity);
        const high = line.high.reduce((a, b) => (b !== null && b > a ? b : a), -Infinity);
        return `${[spec.title, line.name].filter(Boolean).join(", ")}: ${shown(values[0])} at first, ${shown(values.at(-1))} at last, ` +
          `between ${shown(low)} and ${shown(high)}`;
      }).join("; ");
    }

    function move(step) {
      cursor = step === null ? null : Math.min(last, Math.max(first, step));
      drawnCharts.forEach((other) => other.point());
    }

    const follow = (event) => {
      if (place) move(place.step(event.clientX - plot.getBoundingClientRect().left));
    };
    plot.addEventListener("pointermove", follow);
    plot.addEventListener("pointerdown", follow);
    plot.addEventListener("pointerleave", () => move(null));
    plot.addEventListener("keydown", (event) => {
      const here = nearest(main, cursor === null ? last : cursor), count = main.at.length;
      const far = Math.max(1, Math.round(count / 20));
      const to = {
        ArrowLeft: here - 1, ArrowRight: here + 1, PageDown: here - far, PageUp: here + far, Home: 0, End: count - 1,
      }[event.key];
      if (event.key === "Escape") move(null);
      if (to === undefined) return;
      event.preventDefault();
      move(main.at[Math.min(count - 1, Math.max(0, to))]);
    });
    // who moves by keyboard hears the values; a pointer would make it speak without end
    plot.addEventListener("focus", () => readout.setAttribute("aria-live", "polite"));
    plot.addEventListener("blur", () => { readout.removeAttribute("aria-live"); move(null); });

    // ---- the same as a table, made when it is opened
    const details = figure.querySelector(".numbers");
    details.addEventListener("toggle", () => {
      const holder = details.querySelector(".scroll");
      if (!details.open || holder.firstChild) return;
      for (const line of lines) {
        const table = make("table"), head = make("tr"), body = make("tbody"), top = make("thead");
        const columns = line.exact ? [line.mean] : [line.mean, line.low, line.high];
        table.append(make("caption", "", line.name), top, body);
        top.append(head);
        for (const name of ["step", ...["mean", "lowest", "highest"].slice(0, columns.length)])
          head.append(Object.assign(make("th", "", line.exact && name === "mean" ? spec.title.toLowerCase() : name), { scope: "col" }));
        line.at.forEach((_, i) => {
          const row = make("tr"), from = whole.format(line.first[i]), to = whole.format(line.last[i]);
          row.append(make("td", "", from === to ? from : `${from} to ${to}`));
          for (const values of columns) row.append(make("td", "", values[i] === null ? "none" : String(values[i])));
          body.append(row);
        });
        holder.append(table);
      }
    });
    return { render, point };
  }

  const drawnCharts = charts.map(chart);
  const renderAll = () => drawnCharts.forEach((one) => one.render());
  renderAll();
  let width = document.documentElement.clientWidth;
  new ResizeObserver(() => {
    const now = document.documentElement.clientWidth;
    if (now === width) return;
    width = now;
    renderAll();
  }).observe(document.documentElement);
  document.querySelectorAll("input[name=smoothing]").forEach((input) =>
    input.addEventListener("change", () => { smoothing = +input.value; renderAll(); }));
  document.querySelectorAll("input[name=axis]").forEach((input) =>
    input.addEventListener("change", () => { log = input.value === "log"; renderAll(); }));

  // ---- the arguments
  const search = document.getElementById("search"), found = document.getElementById("found");
  const groups = [...document.querySelectorAll("#arguments-table tbody")].map((body) => {
    const [head, ...rows] = body.rows;
    return { head, usual: body.className === "usual", rows: rows.map((row) => ({ row, text: row.textContent.toLowerCase() })) };
  });
  const given = document.querySelector("input[name=which][value=given]");
  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0, all = 0;
    for (const { head, rows, usual } of groups) {
      let here = 0;
      for (const { row, text } of rows) {
        row.hidden = words.length ? !words.every((word) => text.includes(word)) : given.checked && usual;
        here += !row.hidden;
      }
      head.hidden = !here;
      count += here;
      all += rows.length;
    }
    found.textContent = `${count} of ${all} arguments`;
  }
  search.addEventListener("input", filter);
  document.querySelectorAll("input[name=which]").forEach((input) => input.addEventListener("change", filter));
  filter();
})();
