// The arrows of the pipeline's graph. In columns where they fit, a line passes the lanes between its stages; otherwise
// stages stand below each other, and lines run in rails at their left.
{
  const SVG = "http://www.w3.org/2000/svg", COLUMN = 150, GAP = 35, RAIL = 9, BEND = 7;
  const graph = document.getElementById("graph");
  const items = new Map([...graph.querySelectorAll("[data-item]")].map((item) => [item.dataset.item, item]));
  const columns = graph.querySelectorAll("ol > li").length;

  function part(name, attributes) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  function box(name) {
    const from = graph.getBoundingClientRect(), item = items.get(name).getBoundingClientRect();
    return { left: item.left - from.left, right: item.right - from.left, y: item.top - from.top + Math.min(item.height / 2, 22) };
  }

  function throughLanes(path) {
    const stops = path.map(box);
    let line = `M ${stops[0].right} ${stops[0].y}`, at = stops[0];
    for (const [number, to] of stops.slice(1).entries()) {
      const middle = (at.right + to.left) / 2, arrives = number === stops.length - 2;
      line += ` C ${middle} ${at.y} ${middle} ${to.y} ${to.left - (arrives ? 6 : 0)} ${to.y}`;
      if (!arrives) line += ` L ${to.right} ${to.y}`;
      at = to;
    }
    return line;
  }

  // A source has the innermost rail that is free from it down to the last stage that it feeds.
  function rails(order) {
    const until = [], rail = new Map();
    for (const name of order) {
      const fed = data.paths.filter((path) => path[0] === name).map((path) => order.indexOf(path.at(-1)));
      if (!fed.length) continue;
      const own = order.indexOf(name), free = until.findIndex((last) => last < own);
      rail.set(name, free < 0 ? until.length : free);
      until[rail.get(name)] = Math.max(...fed);
    }
    return { rail, count: until.length };
  }

  function alongRail(path, rail) {
    const from = box(path[0]), to = box(path.at(-1)), x = from.left - 14 - RAIL * rail.get(path[0]);
    const leaves = from.y + 9;
    return `M ${from.left} ${leaves} H ${x + BEND} Q ${x} ${leaves} ${x} ${leaves + BEND} ` +
      `V ${to.y - BEND} Q ${x} ${to.y} ${x + BEND} ${to.y} H ${to.left - 6}`;
  }

  function drawGraph() {
    const wide = graph.clientWidth >= columns * COLUMN + (columns - 1) * GAP;
    const order = [...items.keys()].filter((name) => items.get(name).classList.contains("stage"));
    const { rail, count } = rails(order);
    graph.classList.toggle("columns", wide);
    graph.style.paddingLeft = wide || !count ? "" : `${14 + RAIL * count}px`;
    graph.querySelector("svg")?.remove();
    const svg = part("svg", { "aria-hidden": "true" });
    const head = part("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 2, refY: 4, markerWidth: 6, markerHeight: 6, orient: "auto" });
    head.append(part("path", { d: "M 0 0 L 8 4 L 0 8 Z" }));
    svg.append(head);
    for (const path of data.paths) {
      svg.append(part("path", { d: wide ? throughLanes(path) : alongRail(path, rail), "marker-end": "url(#arrow)" }));
    }
    graph.prepend(svg);
    graph.classList.add("drawn");
  }
  drawGraph();
  new ResizeObserver(drawGraph).observe(graph.parentElement);
}
