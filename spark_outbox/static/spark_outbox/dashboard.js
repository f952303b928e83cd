// Keeps a page of the outbox up to date, and takes a repair from one step to the next. Without it the
// pages work as well: they are reloaded by hand, and each step is a click.
"use strict";

(() => {
  const region = document.querySelector("[data-live-url]");
  if (region) keepUpToDate(region);
  const form = document.querySelector("form[data-repair]");
  if (form) goOnByItself(form);

  function keepUpToDate(region) {
    const every = Number(region.dataset.every) * 1000;
    const state = document.querySelector("[data-state]");
    const said = document.querySelector("[data-said]");
    const button = document.querySelector("[data-pause]");
    let timer = null;
    let shown = null; // what the server sent last: without news the page is not touched

    const show = (what) => {
      if (state.dataset.is === what) return;
      state.dataset.is = what;
      state.textContent = state.dataset[what];
    };
    const isPaused = () => {
      const active = document.activeElement;
      const selection = document.getSelection();
      return document.hidden
        || button.getAttribute("aria-pressed") === "true"
        || (active !== null && active.matches("input:not([type=button]), textarea, select"))
        || region.querySelector("input:checked") !== null
        || (!selection.isCollapsed && region.contains(selection.anchorNode));
    };
    const summary = () => region.querySelector("[data-summary]")?.dataset.summary;

    function replace(html) {
      const before = summary();
      const open = [...region.querySelectorAll("details[open]")].map((each) => each.id);
      const focus = region.contains(document.activeElement) ? document.activeElement : null;
      const focused = focus && (focus.closest("details")?.id || "");
      const address = focus && (focus.dataset.focus || focus.id);
      const [x, y] = [window.scrollX, window.scrollY];
      region.innerHTML = html;
      for (const id of open) document.getElementById(id)?.setAttribute("open", "");
      if (focus) {
        const all = [...region.querySelectorAll("a, button, summary")];
        const same = all.find((each) => address && (each.dataset.focus || each.id) === address)
          || document.getElementById(focused)?.querySelector("summary");
        same?.focus({ preventScroll: true });
      }
      window.scrollTo(x, y);
      if (summary() !== before) said.textContent = summary() || "";
    }

    async function look() {
      clearTimeout(timer);
      let pause = every;
      if (isPaused()) {
        show("paused");
        pause = 500; // to see that it may go on
      } else {
        const started = performance.now();
        try {
          const answer = await fetch(region.dataset.liveUrl, { credentials: "same-origin" });
          if (!answer.ok || answer.redirected) throw new Error(answer.statusText);
          const html = await answer.text();
          if (html !== shown && !isPaused()) {
            replace(html);
            shown = html;
          }
          show("live");
        } catch {
          show("lost");
          pause = 3 * every;
        }
        pause = Math.max(pause, 10 * (performance.now() - started)); // a slow server is asked less
      }
      timer = setTimeout(look, pause);
    }

    button.hidden = false;
    button.addEventListener("click", () => {
      const pressed = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(pressed));
      look();
    });
    show("live");
    timer = setTimeout(look, every);
  }

  function goOnByItself(form) {
    const go = form.querySelector("[type=submit]");
    const stop = form.querySelector("[data-stop]");
    const said = form.querySelector("[data-said]");
    let goesOn = false;
    if (!go) return;

    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      goesOn = true;
      said.textContent = "";
      stop.hidden = false;
      stop.focus();
      go.hidden = true;
      let text = "";
      while (goesOn) {
        try {
          const answer = await fetch(form.action, {
            method: "POST", body: new FormData(form), credentials: "same-origin",
          });
          const page = new DOMParser().parseFromString(await answer.text(), "text/html");
          const part = page.querySelector("[data-part]");
          if (!answer.ok || !part) throw new Error(answer.statusText);
          form.querySelector("[data-part]").replaceWith(document.importNode(part, true));
          const label = page.querySelector("[type=submit]#spark-go");
          if (label) go.textContent = label.textContent;
          if (part.dataset.finished !== undefined) {
            goesOn = false;
            go.remove();
            text = form.dataset.ended;
          }
        } catch {
          goesOn = false;
          text = form.dataset.lost;
        }
      }
      said.textContent = text || form.dataset.stopped;
      stop.hidden = true;
      go.hidden = false;
      (go.isConnected ? go : form.querySelector("#spark-back")).focus();
    });
    stop.addEventListener("click", () => {
      goesOn = false;
    });
  }
})();
