"use strict";

const COMMON = {
  font: { family: "DejaVu Sans, Verdana, sans-serif", size: 12, color: "#222" },
  margin: { l: 60, r: 15, t: 15, b: 50 },
  legend: { orientation: "h", x: 0, y: -0.13, yanchor: "top" },
  hovermode: "closest",
  plot_bgcolor: "white",
};
const FRAME_TIME = 80; // milliseconds
const NARROW = 700; // pixels, of a plot

for (const section of document.querySelectorAll("section")) {
  const panel = JSON.parse(section.querySelector(".data").textContent);
  const plot = section.querySelector(".plot");
  // Plotly's default buttons include one that uploads the plot.
  Plotly.newPlot(plot, panel.traces, fitted(panel, plot.clientWidth), {
    responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  });
  if (panel.frames.length) addPlayer(section, plot, panel);
}

// On a narrow screen, put the second axes below the first, and each name on its own legend row.
function fitted(panel, width) {
  const layout = { ...COMMON, ...panel.layout };
  if (width >= NARROW) return layout;
  const names = panel.traces.filter((trace) => trace.name && trace.showlegend !== false).length;
  const axes = layout.xaxis2 === undefined ? 330 : 660; // pixels
  const height = axes + 70 + 20 * names;
  layout.height = height;
  layout.margin = { ...layout.margin, b: 50 + 20 * names };
  layout.legend = { ...layout.legend, y: -55 / axes };
  if (layout.xaxis2 !== undefined) {
    layout.xaxis = { ...layout.xaxis, domain: [0, 1] };
    layout.yaxis = { ...layout.yaxis, domain: [0.46, 1] };
    layout.xaxis2 = { ...layout.xaxis2, domain: [0, 1], anchor: "y2" };
    layout.yaxis2 = { ...layout.yaxis2, domain: [0, 0.36] };
  }
  return layout;
}

// Show the lines up to the slider's step; the button plays the steps.
function addPlayer(section, plot, panel) {
  const [button, slider, label] = ["button", "input", "output"].map((name) => section.querySelector(name));
  const moving = panel.traces.flatMap((trace, index) => (trace.customdata ? [index] : []));
  const full = moving.map((index) => ({ ...panel.traces[index] }));
  const last = panel.frames[panel.frames.length - 1];
  let timer = null;

  function show() {
    const step = panel.frames[slider.value];
    label.value = `step ${step.toLocaleString("en")} of ${last.toLocaleString("en")}`;
    const cuts = full.map((trace) => {
      const end = countUntil(trace.customdata, step);
      return [trace.meta === "last" ? end - 1 : 0, end];
    });
    const part = (key) => full.map((trace, index) => trace[key].slice(...cuts[index]));
    Plotly.restyle(plot, { x: part("x"), y: part("y"), customdata: part("customdata") }, moving);
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    button.textContent = "play";
  }

  function advance() {
    if (+slider.value === panel.frames.length - 1) return stop();
    slider.value = +slider.value + 1;
    show();
  }

  button.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (+slider.value === panel.frames.length - 1) slider.value = 0;
    button.textContent = "pause";
    show();
    timer = setInterval(advance, FRAME_TIME);
  });
  slider.addEventListener("input", () => {
    stop();
    show();
  });
  show();
}

// Return the number of points up to a step, by binary search; points are [step, value], ascending.
function countUntil(points, step) {
  let [low, high] = [0, points.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= step) low = middle + 1;
    else high = middle;
  }
  return low;
}
