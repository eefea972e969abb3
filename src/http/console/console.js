// The console: asks the JSON API every second and shows what it says. Whatever comes from there is
// put into the page as text, never as markup.

const EVERY = 1000; // Between two questions, in ms.
const PATIENCE = 4000; // How long an answer may take.
const STALE = 5000; // Older data are said to be old.
const SAMPLES = 120; // Two minutes of reads and writes.
const HISTORY = 50; // Events shown of one volume.
const LATEST = 20; // And of all.

const $ = (id) => document.getElementById(id);
const cards = new Map(); // By volume: its card and what it needs from one answer to the next.
const latest = []; // Records, newest first.
let heard = null; // When the last answer came, by the page's clock, and the daemon's time in it.
let seen = 0; // The last event's number.
let filtered = { text: "", troubled: false };

// ---- Asking ----

class Refused extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

async function ask(path) {
  const token = sessionStorage.getItem("token");
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const answer = await fetch(`api/v1/${path}`, { headers, cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
  if (!answer.ok) throw new Refused(answer.status, await answer.text());
  return answer.json();
}

async function look() {
  try {
    const status = await ask("volumes");
    heard = { at: performance.now(), now: Date.parse(status.now) };
    $("ask").hidden = true;
    $("data").hidden = false;
    $("forget").hidden = !sessionStorage.getItem("token");
    show(status);
    await events();
  } catch (error) {
    if (error instanceof Refused && error.status === 401) return askForToken(error);
    // Said once the data are old; a single lost answer is no news.
    why = error instanceof Refused ? error.message.trim() : "";
    // It may be another run, whose events have other numbers.
    seen = 0;
    latest.length = 0;
  }
  age();
}
let why = "";

function askForToken() {
  if ($("ask").hidden) {
    $("ask").hidden = false;
    $("token").focus();
  }
  text($("refused"), sessionStorage.getItem("token") ? "That is not the token." : "");
  sessionStorage.removeItem("token");
  $("data").hidden = true;
  text($("summary"), "Locked");
  text($("heard"), "");
  heard = null;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value.trim());
  $("token").value = "";
  look();
});
$("forget").addEventListener("click", () => {
  sessionStorage.removeItem("token");
  location.reload();
});

// ---- The page ----

function text(element, words) {
  // What is the same is left alone: selections stay, and nothing is read out again.
  if (element.textContent !== words) element.textContent = words;
}

function daemonNow() {
  return heard.now + (performance.now() - heard.at);
}

// Says how old the data are, and plainly so when they are old.
function age() {
  if (!heard) {
    const silent = $("ask").hidden && performance.now() > STALE;
    stale(silent, `byokd does not answer. Nothing is known of its volumes. ${why}`);
    return;
  }
  const old = performance.now() - heard.at;
  text($("heard"), old < 2 * EVERY ? "Live" : `Last heard ${duration(old / 1000)} ago`);
  stale(old > STALE, `byokd does not answer. This page shows how volumes were at ${clock(heard.now)}; how they are now is not known. ${why}`);
}

function stale(is, words) {
  if (document.body.classList.contains("stale") === is && $("stale").hidden === !is) return;
  document.body.classList.toggle("stale", is);
  $("stale").hidden = !is;
  text($("stale"), is ? words.trim() : "");
  if (is) document.title = "no answer – byokd";
  for (const card of cards.values()) {
    badge(card);
    if (heard) facts(card);
  }
}

function show(status) {
  text($("summary"), status.summary);
  $("problems").replaceChildren(...status.problems.map((problem) => {
    const item = document.createElement("li");
    item.textContent = `${problem.why} (since ${clock(Date.parse(problem.at))}). ${problem.remedy}`;
    return item;
  }));
  const names = new Set(status.volumes.map((volume) => volume.name));
  for (const [name, card] of cards) {
    if (!names.has(name)) {
      card.item.remove();
      cards.delete(name);
    }
  }
  for (const volume of status.volumes) {
    const card = cards.get(volume.name) ?? newCard(volume.name);
    const before = card.volume;
    card.volume = volume;
    fill(card);
    if (before && label(before) !== label(volume)) {
      text($("announce"), `${volume.name}: ${label(volume)}. ${volume.headline}`);
    }
  }
  order();
  const bad = status.volumes.filter((volume) => urgency(volume) < 4).length;
  document.title = bad ? `${bad} with trouble – byokd` : "byokd";
}

function label(volume) {
  if (volume.state === "detached" && volume.problem) return "not served";
  return volume.state;
}

const GLYPHS = { serving: "●", unverified: "▲", fenced: "■", "not served": "■", detached: "○", attaching: "…", detaching: "…" };

function tone(volume) {
  if (volume.state === "fenced" || (volume.state === "detached" && volume.trouble)) return "bad";
  if (volume.trouble) return "warn";
  return volume.state === "serving" ? "good" : "calm";
}

// Who needs somebody to look comes first, as in byokctl.
function urgency(volume) {
  switch (volume.state) {
    case "fenced": return 0;
    case "unverified": return 2;
    case "serving": return volume.trouble ? 3 : 5;
    case "detached": return volume.trouble ? 1 : 6;
    default: return 4;
  }
}

function order() {
  const wanted = [...cards.values()].sort((a, b) =>
    urgency(a.volume) - urgency(b.volume) || (a.volume.name < b.volume.name ? -1 : 1));
  let shown = 0;
  const list = $("volumes");
  wanted.forEach((card, at) => {
    if (list.children[at] !== card.item) {
      const focused = card.item.contains(document.activeElement) ? document.activeElement : null;
      list.insertBefore(card.item, list.children[at] ?? null);
      focused?.focus({ preventScroll: true });
    }
    card.item.hidden = !fits(card.volume);
    shown += card.item.hidden ? 0 : 1;
  });
  $("none").hidden = shown > 0;
  text($("none"), cards.size ? "No volume fits." : "There are no volumes. `byokctl volume create` makes one.");
}

function fits(volume) {
  if (filtered.troubled && !volume.trouble) return false;
  const words = [volume.name, volume.key, volume.purpose, label(volume), ...Object.values(volume.context ?? {})];
  return words.some((word) => word?.toLowerCase().includes(filtered.text));
}

$("filter").addEventListener("input", (event) => {
  filtered.text = event.target.value.trim().toLowerCase();
  order();
});
$("troubled").addEventListener("change", (event) => {
  filtered.troubled = event.target.checked;
  order();
});

// ---- A volume ----

function newCard(name) {
  const item = $("card").content.firstElementChild.cloneNode(true);
  const part = (selector) => item.querySelector(selector);
  const card = { item, part, samples: [], is: {}, parts: {} };
  for (const element of item.querySelectorAll("[data-is]")) card.is[element.dataset.is] = element;
  for (const element of item.querySelectorAll("[data-part]")) card.parts[element.dataset.part] = element;
  const heading = part("h3");
  heading.textContent = name;
  heading.id = `volume-${name}`;
  part("article").setAttribute("aria-labelledby", heading.id);
  part("summary").setAttribute("aria-label", `History of key events of ${name}`);
  part("details").addEventListener("toggle", () => history(card));
  part(".copy").setAttribute("aria-label", `Copy the request id of ${name}`);
  part(".copy").addEventListener("click", () => copy(card.is.id));
  cards.set(name, card);
  return card;
}

async function copy(element) {
  // Where a page may not write to the clipboard, what is selected can be copied by hand.
  getSelection().selectAllChildren(element);
  try {
    await navigator.clipboard.writeText(element.textContent);
    text($("announce"), "The request id is copied");
  } catch {
    text($("announce"), "The request id is selected");
  }
}

function badge(card) {
  const words = label(card.volume);
  const was = document.body.classList.contains("stale") ? "was " : "";
  text(card.part(".state"), `${GLYPHS[words] ?? ""} ${was}${words}`);
}

function fill(card) {
  const { volume, is, parts } = card;
  card.part("article").dataset.tone = tone(volume);
  badge(card);
  const trouble = volume.trouble;
  card.part(".trouble").hidden = !trouble;
  // The cause says it.
  card.part(".headline").hidden = Boolean(trouble);
  text(card.part(".headline"), volume.headline);
  if (trouble) {
    for (const name of ["cause", "evidence", "effect", "remedy"]) text(is[name], trouble[name]);
    const id = trouble.evidence.match(/\(request id ([^ ,)]+)/)?.[1];
    parts.id.hidden = !id || id === "none";
    text(is.id, id ?? "");
  }
  text(is.key, volume.key ?? volume.header_note ?? "not known");
  const context = Object.entries(volume.context ?? {}).filter(([name]) => !name.startsWith("byokd:"));
  const what = [volume.purpose, volume.size && bytes(volume.size), volume.read_only && "read-only", ...context.map((pair) => pair.join("="))];
  text(is.what, what.filter(Boolean).join(" · ") || "not known");
  parts.device.hidden = !volume.device;
  if (volume.device) text(is.device, device(volume.device));
  facts(card);
  sample(card);
}

function device(device) {
  const requests = { served: "requests are served", wait: "requests wait for the key", refused: "requests are answered with errors" };
  return [`${device.link} (${device.path}): ${requests[device.requests]}`, ...device.recover.map((command) => `to mount anew: ${command}`)].join("; ");
}

// What changes with time alone is counted on between two answers, by the daemon's clock.
function facts(card) {
  const { volume, is, parts } = card;
  const lease = volume.lease;
  for (const name of ["since", "success", "left", "clients"]) parts[name].hidden = !lease;
  if (!lease) return;
  parts.left.hidden = volume.state === "fenced";
  text(is.since, `${lease.state} for ${ago(lease.since)}, since ${clock(Date.parse(lease.since))}`);
  text(is.success, lease.last_success ? `${ago(lease.last_success)} ago, at ${clock(Date.parse(lease.last_success))}` : "never");
  const old = (performance.now() - heard.at) / 1000;
  if (document.body.classList.contains("stale")) text(is.left, "not known");
  else if (lease.remaining === null) text(is.left, "it is served all the same, without end");
  else text(is.left, `fenced in ${duration(Math.max(0, lease.remaining - old))}`);
  const errors = volume.failed_requests;
  const failed = errors ? `; ${errors} ${errors === 1 ? "request" : "requests"} failed` : "";
  text(is.clients, `${volume.connections}${failed}`);
}

function ago(time) {
  return duration(Math.max(0, (daemonNow() - Date.parse(time)) / 1000));
}

function sample(card) {
  const io = card.volume.io;
  const figure = card.part("figure");
  figure.hidden = !io.read;
  if (!io.read) {
    card.samples = [];
    return;
  }
  const now = { at: heard.now, read: io.read.bytes, write: io.write.bytes };
  const last = card.samples.at(-1);
  // Counters begin anew when it is attached anew.
  if (last && (now.read < last.read || now.write < last.write)) card.samples = [];
  card.samples.push(now);
  if (card.samples.length > SAMPLES + 1) card.samples.shift();
  const rates = card.samples.slice(1).map((sample, at) => {
    const before = card.samples[at];
    const seconds = Math.max(0.001, (sample.at - before.at) / 1000);
    return { at: sample.at, read: (sample.read - before.read) / seconds, write: (sample.write - before.write) / seconds };
  });
  const top = Math.max(1, ...rates.flatMap((rate) => [rate.read, rate.write]));
  for (const kind of ["read", "write"]) {
    const points = rates.map((rate) => {
      const x = 240 - ((now.at - rate.at) / (SAMPLES * EVERY)) * 240;
      return `${x.toFixed(1)},${(34 - (rate[kind] / top) * 32).toFixed(1)}`;
    });
    card.part(`path.${kind}`).setAttribute("d", points.length ? `M${points.join("L")}` : "");
  }
  const rate = rates.at(-1) ?? { read: 0, write: 0 };
  const idle = top <= 1;
  card.part("svg").toggleAttribute("hidden", idle);
  const most = idle ? "; none in two minutes" : `; the most in two minutes was ${bytes(top)}/s`;
  text(card.part("figcaption"), `Reads ${bytes(rate.read)}/s, writes ${bytes(rate.write)}/s${most}`);
  const label = `Reads and writes of ${card.volume.name} in the last two minutes`;
  if (card.part("svg").getAttribute("aria-label") !== label) card.part("svg").setAttribute("aria-label", label);
}

// ---- Events ----

async function events() {
  const { events } = await ask(`events?since=${seen}&last=1000`);
  if (!events.length) return;
  const last = events.at(-1).record;
  seen = last.seq;
  latest.unshift(...events.slice().reverse());
  latest.length = Math.min(latest.length, LATEST);
  list($("events"), latest, true);
  const touched = new Set(events.map((event) => event.record.volume));
  for (const [name, card] of cards) if (touched.has(name)) await history(card);
}

async function history(card) {
  if (!card.part("details").open) return;
  try {
    const { events } = await ask(`events?volume=${encodeURIComponent(card.volume.name)}&last=${HISTORY}`);
    list(card.part(".events"), events.reverse(), false);
  } catch {
    // The page says that byokd does not answer.
  }
}

function list(element, events, named) {
  element.replaceChildren(...events.map(({ words, record }) => {
    const item = document.createElement("li");
    const time = document.createElement("time");
    time.dateTime = record.time;
    time.textContent = clock(Date.parse(record.time));
    const what = document.createElement("span");
    if (named && record.volume) {
      const name = document.createElement("b");
      name.textContent = `${record.volume}: `;
      what.append(name);
    }
    what.append(words);
    item.append(time, what);
    return item;
  }));
}

// ---- Words ----

// In UTC, as the log, byokctl and CloudTrail have it; with the day unless it is today.
function clock(time) {
  const [day, hour] = new Date(time).toISOString().slice(0, 19).split("T");
  const today = heard && new Date(heard.now).toISOString().slice(0, 10) === day;
  return today ? `${hour} UTC` : `${day} ${hour} UTC`;
}

function duration(seconds) {
  const whole = Math.floor(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (number >= 1024 && at < units.length - 1) {
    number /= 1024;
    at += 1;
  }
  return `${number < 10 && at ? number.toFixed(1) : Math.round(number)} ${units[at]}`;
}

// ---- On and on ----

// One question after the other: a slow daemon is not asked ever more.
async function go() {
  // While the token is asked for there is nothing to hear.
  if ($("ask").hidden) await look();
  setTimeout(go, EVERY);
}

// Between answers time goes on.
setInterval(() => {
  age();
  if (heard) for (const card of cards.values()) if (card.volume) facts(card);
}, EVERY);

go();
