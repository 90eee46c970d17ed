"use strict";
// Language: the reader's choice, else the browser's, else the one the page was made in.
(function () {
  const page = document.documentElement;
  const buttons = document.querySelectorAll("[data-lang]");
  function speak(language) {
    page.lang = language;
    buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.lang === language)));
  }
  buttons.forEach((button) => button.addEventListener("click", () => speak(button.dataset.lang)));
  const asked = location.hash.slice(1);
  const own = (navigator.language || "").toLowerCase().startsWith("zh") ? "zh" : page.lang;
  speak(asked === "zh" || asked === "en" ? asked : own);

  // The gallery: cards that answer to all filters; j and k go from card to card, / to the text field, Escape out of it.
  const form = document.getElementById("filter");
  if (!form) return;
  const cards = Array.from(document.querySelectorAll("#cards > article"));
  const kind = document.getElementById("type");
  const text = document.getElementById("text");
  const count = document.getElementById("count");
  const changes = Array.from(form.querySelectorAll("[data-show]"));
  let change = "";
  function apply() {
    const words = text.value.toLowerCase();
    let left = 0;
    for (const card of cards) {
      const fits = (!change || card.dataset.change === change) && (!kind.value || card.dataset.type === kind.value)
        && (!words || card.textContent.toLowerCase().includes(words));
      card.hidden = !fits;
      left += fits;
    }
    count.textContent = `${left} / ${cards.length}`;
    changes.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.show === change)));
  }
  changes.forEach((button) => button.addEventListener("click", () => { change = button.dataset.show; apply(); }));
  kind.addEventListener("change", apply);
  text.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  text.addEventListener("keydown", (event) => { if (event.key === "Escape") text.blur(); });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    if (event.key === "/") {
      event.preventDefault();
      text.focus();
    } else if (event.key === "j" || event.key === "k") {
      const shown = cards.filter((card) => !card.hidden);
      const here = shown.indexOf(document.activeElement);
      const next = shown[here + (event.key === "j" ? 1 : -1)] || (here < 0 ? shown[0] : null);
      if (next) next.focus();
    }
  });
  apply();
})();
