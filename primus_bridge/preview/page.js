// Draws the sequences from the JSON beside it. Text of the data only ever becomes text nodes.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const special = new Set(data.special);
  const root = document.documentElement;
  const TOKENS = 4096, ROWS = 500, FIRST_DRAWN = 16000; // a step of "show more"; tokens drawn before anybody asks
  const number = new Intl.NumberFormat("en");
  const coloured = ["system", "user", "assistant", "tool"];
  let drawn = 0, pinned = null;

  function make(tag, name, text) {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function strength(weight) {
    return weight === 0 ? "masked" : weight < 1 ? "part" : "full";
  }

  // the classes by which CSS colours a token's span and its row
  function classes(sequence, i) {
    const role = data.roles[sequence.roles[i]];
    return strength(sequence.weights[i]) + (coloured.includes(role) ? " " + role : "");
  }

  // a token's text by itself, where a space would not be seen
  function alone(text) {
    return text.replaceAll(/[\n\t]/g, "").replaceAll(" ", "\u2423");
  }

  function facts(sequence, i) {
    const turn = sequence.turns[i];
    return [
      ["id", sequence.ids[i]],
      ["loss weight", sequence.weights[i]],
      ["role", data.roles[sequence.roles[i]] || "template"],
      ["turn", turn < 0 ? "none" : turn],
      ["segment", sequence.segments[i]],
      ["position", sequence.positions[i]],
      ["token", i],
    ];
  }

  // ---- the panel with one token's facts
  const panel = document.getElementById("details");
  function tell(sequence, i) {
    const list = make("dl");
    for (const [name, value] of facts(sequence, i)) list.append(make("dt", "", name), make("dd", "", value));
    const big = make("div", "big", alone(sequence.shown[i]) || "a part of the next token's character");
    panel.querySelector(".body").replaceChildren(big, list);
  }

  function pin(node) {
    if (pinned) pinned.setAttribute("aria-selected", "false");
    pinned = node;
    node.setAttribute("aria-selected", "true");
    node.parentNode.setAttribute("aria-activedescendant", node.id);
    tell(data.sequences[node.dataset.s], +node.dataset.i);
    panel.classList.add("open");
    node.scrollIntoView({ block: "nearest" });
  }

  panel.querySelector(".close").addEventListener("click", () => panel.classList.remove("open"));

  // ---- one sequence
  function card(sequence, s) {
    const section = document.getElementById("sequence-" + s);
    const text = section.querySelector(".text-view"), grid = section.querySelector(".grid-view tbody");
    const foot = section.querySelector(".foot.more");
    const total = sequence.ids.length;
    let inText = 0, inTable = 0, list = null, segment = null;

    function begin(i) {
      segment = sequence.segments[i];
      const doc = make("div", "doc g" + (segment % 6));
      const head = make("h4");
      const source = sequence.sources[segment];
      head.append(make("b", "", "Segment " + segment), source ? " \u00b7 " + source : "");
      list = make("div", "tokens");
      list.setAttribute("role", "listbox");
      list.setAttribute("tabindex", "0");
      list.setAttribute("aria-label", "Tokens of sequence " + s + ", segment " + segment);
      doc.append(head, list);
      text.append(doc);
    }

    function growText(count) {
      const end = Math.min(total, inText + count);
      for (let i = inText; i < end; i++) {
        if (sequence.segments[i] !== segment) begin(i);
        const node = make("span", "t " + classes(sequence, i), sequence.shown[i]);
        if (special.has(sequence.ids[i])) node.classList.add("special");
        if (sequence.shown[i] === "") node.classList.add("none");
        if (list.childNodes.length === 0 || sequence.turns[i] !== sequence.turns[i - 1]) node.classList.add("begins");
        node.id = "t" + s + "-" + i;
        node.dataset.s = s;
        node.dataset.i = i;
        node.setAttribute("role", "option");
        node.setAttribute("aria-selected", "false");
        list.append(node);
      }
      drawn += end - inText;
      inText = end;
    }

    function growTable(count) {
      const end = Math.min(total, inTable + count);
      for (let i = inTable; i < end; i++) {
        const row = make("tr", classes(sequence, i) + " g" + (sequence.segments[i] % 6));
        row.append(
          make("td", "", i), make("td", "", sequence.ids[i]),
          make("td", "piece" + (special.has(sequence.ids[i]) ? " special" : ""), alone(sequence.shown[i])),
          make("td", "", sequence.weights[i]), make("td", "word", data.roles[sequence.roles[i]] || "template"),
          make("td", "", sequence.turns[i] < 0 ? "" : sequence.turns[i]),
          make("td", "", sequence.segments[i]), make("td", "", sequence.positions[i]));
        grid.append(row);
      }
      inTable = end;
    }

    function more() {
      const table = root.dataset.view === "table";
      const done = table ? inTable : inText;
      foot.replaceChildren();
      if (done >= total) return;
      const step = Math.min(total - done, table ? ROWS : TOKENS);
      const button = make("button", "button", "Show " + number.format(step) + " more");
      button.type = "button";
      button.addEventListener("click", () => { (table ? growTable : growText)(step); more(); });
      foot.append(button, number.format(done) + " of " + number.format(total) + " tokens are shown");
    }

    function view() {
      if (root.dataset.view === "table" && inTable === 0) growTable(ROWS);
      more();
    }

    if (drawn < FIRST_DRAWN) growText(TOKENS);
    view();
    return view;
  }

  const views = data.sequences.map(card);

  // ---- pointer and keyboard
  const sequences = document.getElementById("sequences");
  const token = (event) => event.target.closest(".t");
  sequences.addEventListener("click", (event) => { if (token(event)) pin(token(event)); });
  sequences.addEventListener("mouseover", (event) => {
    const node = token(event);
    if (node) tell(data.sequences[node.dataset.s], +node.dataset.i);
  });
  sequences.addEventListener("mouseout", (event) => {
    if (token(event) && pinned) tell(data.sequences[pinned.dataset.s], +pinned.dataset.i);
  });
  sequences.addEventListener("keydown", (event) => {
    const list = event.target.closest(".tokens");
    if (!list) return;
    const here = pinned && pinned.parentNode === list ? pinned : null;
    const next = {
      ArrowRight: () => (here ? here.nextSibling : list.firstChild), ArrowDown: () => (here ? here.nextSibling : list.firstChild),
      ArrowLeft: () => here && here.previousSibling, ArrowUp: () => here && here.previousSibling,
      Home: () => list.firstChild, End: () => list.lastChild,
    }[event.key];
    if (!next) return;
    event.preventDefault();
    const node = next();
    if (node) pin(node);
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") panel.classList.remove("open"); });

  // ---- switches
  document.querySelectorAll("input[name=colour]").forEach((input) =>
    input.addEventListener("change", () => { root.dataset.colour = input.value; }));
  document.querySelectorAll("input[name=view]").forEach((input) =>
    input.addEventListener("change", () => { root.dataset.view = input.value; views.forEach((view) => view()); }));
})();
