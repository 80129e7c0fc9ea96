// What the pages do beyond HTML: draw charts, and keep a watched part up to date. Without this
// script every page still shows the state at which it was loaded.
"use strict";

(() => {
  const POLL_MS = 2000; // the pace when there is no stream
  const LOOK_MS_MIN = 1000; // rings come in bursts; nobody reads faster than this
  const SLOW_LOOK_MS = 10000; // with a stream, for what rings no bell: measurements, clocks
  const CHART_HEIGHT = 230;

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const options = (holder, labels, few) => ({
    width: Math.max(holder.clientWidth, 260),
    height: CHART_HEIGHT,
    scales: {
      x: { time: false, range: (_plot, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) },
      // A flat line is no drama: the axis spans at least a tenth of the value.
      y: { range: (_plot, low, high) => {
        const spare = Math.max((high - low) * 0.08, Math.abs(high) * 0.05, 1e-6);
        return [low - spare, high + spare];
      } },
    },
    cursor: { drag: { x: true, y: false } },
    axes: [0, 1].map((side) => ({
      stroke: colour("--quiet"),
      grid: { stroke: colour("--line"), width: 1 },
      ticks: { stroke: colour("--line"), width: 1 },
      size: side ? 62 : 34,
      incrs: !side ? [1, 2, 5].flatMap((first) => Array.from({ length: 12 }, (_none, power) => first * 10 ** power)) : undefined,
    })),
    series: [
      { label: holder.dataset.over.replaceAll("_", " ") },
      ...labels.map((label, index) => ({
        label,
        stroke: colour(`--series-${(index % 8) + 1}`),
        width: 2,
        dash: label === "predicted" ? [6, 5] : undefined,
        spanGaps: true,
        points: { show: few || label === "held out", size: 6 },
      })),
    ],
  });

  const draw = async (holder) => {
    let columns;
    try {
      const answer = await fetch(holder.dataset.url, { headers: { Accept: "application/json" } });
      if (!answer.ok) return;
      columns = await answer.json();
    } catch {
      return; // the next look tries again
    }
    const names = holder.dataset.curve.split(" ");
    const data = [columns[holder.dataset.over], ...names.map((name) => columns[name])];
    const drawn = names.some((name) => columns[name].some((value) => value !== null));
    if (!drawn || data[0].length < 1) {
      if (!holder.plot) holder.replaceChildren(Object.assign(document.createElement("p"), { textContent: "No measurements yet." }));
      return;
    }
    if (holder.plot) {
      holder.plot.setData(data);
      return;
    }
    holder.replaceChildren();
    holder.plot = new uPlot(options(holder, holder.dataset.labels.split(", "), data[0].length < 3), data, holder);
    holder.dataset.drawn = "yes";
  };

  const drawAll = () => document.querySelectorAll(".chart").forEach(draw);

  // Redraws where the width or the palette changed.
  const redraw = () => {
    document.querySelectorAll(".chart").forEach((holder) => {
      if (!holder.plot) return;
      holder.plot.destroy();
      holder.plot = null;
      draw(holder);
    });
  };

  // Keeps what a person opened or closed, and how far a log was scrolled, when a part is renewed.
  const keepView = (part) => {
    let kept = {};
    part.addEventListener("htmx:beforeSwap", () => {
      kept = {};
      part.querySelectorAll("details[id]").forEach((details) => {
        const log = details.querySelector(".log");
        const atEnd = log && log.scrollTop + log.clientHeight >= log.scrollHeight - 4;
        kept[details.id] = { open: details.open, top: log ? log.scrollTop : 0, atEnd };
      });
    });
    part.addEventListener("htmx:afterSwap", () => {
      part.querySelectorAll("details[id]").forEach((details) => {
        const was = kept[details.id];
        const log = details.querySelector(".log");
        if (was) details.open = was.open;
        if (log) log.scrollTop = !was || was.atEnd ? log.scrollHeight : was.top;
      });
    });
  };

  const watch = (part) => {
    let last = 0;
    let waiting = 0;
    let live = false;
    let timer = 0;
    let stream = null;

    const look = () => {
      waiting = 0;
      last = Date.now();
      if (document.hidden) return;
      htmx.trigger(part, "look");
      drawAll();
    };
    const lookSoon = () => {
      if (!waiting) waiting = setTimeout(look, Math.max(0, LOOK_MS_MIN - (Date.now() - last)));
    };
    const pace = () => {
      clearInterval(timer);
      timer = setInterval(lookSoon, live ? SLOW_LOOK_MS : POLL_MS);
      part.dataset.live = live ? "stream" : "polling";
    };

    if (part.dataset.stream && window.EventSource) {
      // A refused stream (all taken) stays closed; a broken one opens again by itself. Both poll meanwhile.
      stream = new EventSource(part.dataset.stream);
      stream.addEventListener("look", lookSoon);
      stream.addEventListener("open", () => { live = true; pace(); });
      stream.addEventListener("error", () => { live = false; pace(); });
    }
    part.addEventListener("htmx:afterSwap", () => {
      if (!part.querySelector("[data-final]")) return;
      clearInterval(timer);
      if (stream) stream.close();
      drawAll();
    });
    document.addEventListener("visibilitychange", () => { if (!document.hidden) lookSoon(); });
    keepView(part);
    pace();
  };

  drawAll();
  document.querySelectorAll("[data-watch]").forEach(watch);
  document.querySelectorAll(".log").forEach((log) => { log.scrollTop = log.scrollHeight; });
  let resized = 0;
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    clearTimeout(resized);
    resized = setTimeout(redraw, 150);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
})();
