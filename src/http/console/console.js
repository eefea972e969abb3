// The console: asks the JSON API every second and shows what it says. Whatever comes from there is
// put into the page as text, never as markup.

const EVERY = 1000; // Between two questions, in ms.
const PATIENCE = 4000; // How long an answer may take.
const STALE = 5000; // Older data are said to be old.
const SAMPLES = 120; // Two minutes of reads and writes.
const HISTORY = 50; // Events shown of one volume.
const LATEST = 20; // And of all.
const SAID = 20; // What was read out last is kept.

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
  summary = "";
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

// What a browser would not show, or would turn what follows around for, is shown as an escape, as in
// byokctl and the log: nobody's words make a request id read backwards.
const HIDDEN = /[\p{Cc}\p{Cf}\u2028\u2029\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\uffa0\ufff0-\ufffb\u{e0000}-\u{e0fff}]/gu;
const SHORT = { "\n": "\\n", "\r": "\\r", "\t": "\\t" };

function visible(words) {
  return words.replace(HIDDEN, (c) => SHORT[c] ?? `\\u{${c.codePointAt(0).toString(16)}}`);
}

function text(element, words) {
  words = visible(words);
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
  heading();
  for (const card of cards.values()) {
    badge(card);
    describe(card);
    if (heard) facts(card);
    rates(card);
  }
}

function isStale() {
  return document.body.classList.contains("stale");
}

// What was so, and may not be so any more, says that it was.
function was(words) {
  return isStale() ? `Last known: ${words}` : words;
}

function heading() {
  if (summary) text($("summary"), was(summary));
}
let summary = "";

function show(status) {
  summary = status.summary;
  heading();
  $("problems").replaceChildren(...status.problems.map((problem) => {
    const item = document.createElement("li");
    text(item, `${problem.why} (since ${clock(Date.parse(problem.at))}). ${problem.remedy}`);
    return item;
  }));
  const names = new Set(status.volumes.map((volume) => volume.name));
  for (const [name, card] of cards) {
    if (!names.has(name)) {
      card.item.remove();
      cards.delete(name);
    }
  }
  const changed = [];
  for (const volume of status.volumes) {
    const card = cards.get(volume.name) ?? newCard(volume.name);
    const before = card.volume;
    card.volume = volume;
    fill(card);
    if (before && label(before) !== label(volume)) changed.push(volume);
  }
  changed.sort((a, b) => urgency(a) - urgency(b));
  if (changed.length) announce(changes(changed));
  order();
  const bad = status.volumes.filter((volume) => urgency(volume) < 4).length;
  document.title = bad ? `${bad} with trouble – byokd` : "byokd";
}

// Each is read out, one after the other: none takes the place of one that was not read yet.
function announce(words) {
  const said = document.createElement("p");
  text(said, words);
  $("announce").append(said);
  while ($("announce").children.length > SAID) $("announce").firstElementChild.remove();
}

// All that have changed, by what they are now; those that are the same way for the same reason together.
function changes(volumes) {
  const ways = new Map();
  for (const volume of volumes) {
    const way = `${label(volume)}. ${volume.headline}`;
    ways.set(way, [...(ways.get(way) ?? []), volume.name]);
  }
  return [...ways].map(([way, names]) => `${names.join(", ")}: ${way}`).join(". ");
}

function label(volume) {
  // While it is tried again it is no other way.
  if ((volume.state === "detached" || volume.state === "attaching") && volume.problem) return "not served";
  return volume.state;
}

const GLYPHS = { serving: "●", unverified: "▲", fenced: "■", "not served": "■", detached: "○", attaching: "…", detaching: "…" };

function tone(volume) {
  if (volume.state === "fenced" || label(volume) === "not served") return "bad";
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
    case "attaching": return volume.trouble ? 1 : 4;
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
  text(heading, name);
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
    announce("The request id is copied");
  } catch {
    announce("The request id is selected");
  }
}

function badge(card) {
  const words = label(card.volume);
  text(card.part(".state"), `${GLYPHS[words] ?? ""} ${isStale() ? "was " : ""}${words}`);
}

function describe(card) {
  const { volume, is } = card;
  const trouble = volume.trouble;
  text(card.part(".headline"), was(volume.headline));
  if (!trouble) return;
  text(is.cause, was(trouble.cause));
  text(is.evidence, trouble.evidence);
  text(is.effect, was(trouble.effect));
  text(is.remedy, trouble.remedy);
}

function fill(card) {
  const { volume, is, parts } = card;
  card.part("article").dataset.tone = tone(volume);
  badge(card);
  const trouble = volume.trouble;
  card.part(".trouble").hidden = !trouble;
  // The cause says it.
  card.part(".headline").hidden = Boolean(trouble);
  describe(card);
  if (trouble) {
    // The last one: what KMS says comes before it, and may look like one.
    const id = [...trouble.evidence.matchAll(/\(request id ([^ ,)]+)/g)].at(-1)?.[1];
    parts.id.hidden = !id;
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

// What changes with time alone is counted on between two answers, by the daemon's clock; when answers
// stay away, it stops where they ended.
function facts(card) {
  const { volume, is, parts } = card;
  const lease = volume.lease;
  for (const name of ["since", "success", "left", "clients"]) parts[name].hidden = !lease;
  if (!lease) return;
  parts.left.hidden = volume.state === "fenced";
  const since = clock(Date.parse(lease.since));
  text(is.since, isStale() ? `was ${lease.state}, since ${since}` : `${lease.state} for ${ago(lease.since)}, since ${since}`);
  const success = lease.last_success && clock(Date.parse(lease.last_success));
  if (!success) text(is.success, "never");
  else text(is.success, isStale() ? `at ${success}, as far as is known` : `${ago(lease.last_success)} ago, at ${success}`);
  const old = (performance.now() - heard.at) / 1000;
  if (isStale()) text(is.left, "not known");
  else if (lease.remaining === null) text(is.left, "it is served all the same, without end");
  else text(is.left, `fenced in ${duration(Math.max(0, lease.remaining - old))}`);
  const errors = volume.failed_requests;
  const failed = errors ? `; ${errors} ${errors === 1 ? "request" : "requests"} failed` : "";
  text(is.clients, `${isStale() ? "were " : ""}${volume.connections}${failed}`);
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
    card.rate = null;
    return;
  }
  // What was served: what failed is told as that.
  const served = (of) => of.bytes - of.failed_bytes;
  const failed = Object.values(io).reduce((sum, of) => sum + of.failed, 0);
  const now = { at: heard.now, asked: io.read.bytes + io.write.bytes, read: served(io.read), write: served(io.write), failed };
  const last = card.samples.at(-1);
  // Counters begin anew when it is attached anew.
  if (last && (now.asked < last.asked || now.failed < last.failed)) card.samples = [];
  card.samples.push(now);
  if (card.samples.length > SAMPLES + 1) card.samples.shift();
  const each = card.samples.slice(1).map((sample, at) => {
    const before = card.samples[at];
    const seconds = Math.max(0.001, (sample.at - before.at) / 1000);
    // What was asked for before and has failed since was never served.
    const rate = (kind) => Math.max(0, sample[kind] - before[kind]) / seconds;
    return { at: sample.at, read: rate("read"), write: rate("write"), failed: rate("failed") };
  });
  const top = Math.max(1, ...each.flatMap((rate) => [rate.read, rate.write]));
  for (const kind of ["read", "write"]) {
    const points = each.map((rate) => {
      const x = 240 - ((now.at - rate.at) / (SAMPLES * EVERY)) * 240;
      return `${x.toFixed(1)},${(34 - (rate[kind] / top) * 32).toFixed(1)}`;
    });
    card.part(`path.${kind}`).setAttribute("d", points.length ? `M${points.join("L")}` : "");
  }
  const idle = top <= 1;
  card.part("svg").toggleAttribute("hidden", idle);
  card.rate = { read: 0, write: 0, failed: 0, ...each.at(-1), top: idle ? 0 : top };
  rates(card);
  const label = `Reads and writes of ${card.volume.name} in the last two minutes`;
  if (card.part("svg").getAttribute("aria-label") !== label) card.part("svg").setAttribute("aria-label", label);
}

function rates(card) {
  if (!card.rate) return;
  const { read, write, failed, top } = card.rate;
  const most = top ? `; the most in two minutes was ${bytes(top)}/s` : "; none in two minutes";
  const errors = failed ? `; ${failed < 1 ? "some" : Math.round(failed)} requests a second fail` : "";
  const reads = isStale() ? "Last known: reads" : "Reads";
  text(card.part("figcaption"), `${reads} ${bytes(read)}/s, writes ${bytes(write)}/s${errors}${most}`);
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
      text(name, `${record.volume}: `);
      what.append(name);
    }
    what.append(visible(words));
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
