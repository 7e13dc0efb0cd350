// Behaviour of the page that needs no server: stale results, shared links, sorting, keyboard. Makes no requests.
const worldpm = (() => {
  const results = { compare: "compare-result", best: "best-result" };
  const edits = { compare: 0, best: 0 };
  const submittedEdits = { compare: 0, best: 0 };
  const hash = "#compare=";

  // A result is stale if the inputs were edited after they were submitted.
  const updateStale = (tab) => {
    const result = document.getElementById(results[tab]);
    result?.classList.toggle("stale", edits[tab] !== submittedEdits[tab] && !!result.querySelector(".result"));
  };
  const edited = (tab = "compare") => {
    edits[tab] += 1;
    updateStale(tab);
  };
  const tabOf = (element) => Object.keys(results).find((tab) => element.closest?.(`#${tab}-inputs`));

  const showStatus = (text) => {
    document.getElementById("compare-status").textContent = text;
  };
  const encode = (value) => {
    const bytes = new TextEncoder().encode(JSON.stringify(value));
    let text = "";
    for (const byte of bytes) text += String.fromCharCode(byte);
    return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  };
  const decode = (text) => {
    const bytes = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
    return new TextDecoder().decode(Uint8Array.from(bytes, (character) => character.charCodeAt(0)));
  };

  const share = async (roles, [system, a, b, ...texts]) => {
    const turns = roles.map((role, index) => ({ role, content: texts[index] ?? "" }));
    history.replaceState(null, "", location.pathname + location.search + hash + encode({ system, turns, a, b }));
    try {
      await navigator.clipboard.writeText(location.href);
      showStatus("Link copied. It contains the texts themselves.");
    } catch {
      showStatus("The link is in the address bar. It contains the texts themselves.");
    }
  };
  const opened = () => {
    if (!location.hash.startsWith(hash)) return [""];
    try {
      return [decode(location.hash.slice(hash.length))];
    } catch {
      return ["unreadable"];
    }
  };

  const sort = (button) => {
    const header = button.closest("th");
    const table = button.closest("table");
    const column = [...header.parentNode.children].indexOf(header);
    const descending = header.getAttribute("aria-sort") !== "descending";
    const key = (row) => row.children[column].dataset.sort ?? row.children[column].textContent.trim();
    const order = (left, right) => {
      const [x, y] = [key(left), key(right)];
      if (x === "" || y === "") return (x === "") - (y === ""); // rows without a value stay last
      const difference = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return descending ? -difference : difference;
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
    for (const each of header.parentNode.children) each.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  };

  document.addEventListener("input", (event) => {
    const tab = tabOf(event.target);
    if (tab) edited(tab);
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("button.sort");
    if (button) sort(button);
    const link = event.target.closest?.('.report a[href^="#"]');
    if (link) {
      event.preventDefault();
      const target = document.querySelector(link.getAttribute("href"));
      if (target?.tagName === "DETAILS") target.open = true;
      target?.scrollIntoView({ behavior: "smooth" });
    }
  });
  document.addEventListener(
    "keydown",
    (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      const tab = tabOf(event.target);
      if (!tab) return;
      event.preventDefault();
      event.stopPropagation();
      document.getElementById(`${tab}-run`)?.click();
    },
    true,
  );

  // Scroll to a new result, and mark it stale if the inputs were edited while it was computed.
  const watch = () => {
    for (const tab of Object.keys(results)) {
      const result = document.getElementById(results[tab]);
      if (!result || result.dataset.watched) continue;
      result.dataset.watched = "yes";
      result.setAttribute("aria-live", "polite");
      new MutationObserver(() => {
        updateStale(tab);
        const box = result.getBoundingClientRect();
        if (result.textContent.trim() && box.top > innerHeight - 240) result.scrollIntoView({ block: "start", behavior: "smooth" });
      }).observe(result, { childList: true, subtree: true });
    }
  };
  new MutationObserver(watch).observe(document, { childList: true, subtree: true });

  return {
    edited,
    share,
    opened,
    submitted: (texts, tab = "compare") => {
      submittedEdits[tab] = edits[tab];
      document.getElementById(`${tab}-run`).setAttribute("aria-busy", "true");
      return texts;
    },
    answered: (tab = "compare") => document.getElementById(`${tab}-run`).removeAttribute("aria-busy"),
  };
})();
window.worldpm = worldpm;
