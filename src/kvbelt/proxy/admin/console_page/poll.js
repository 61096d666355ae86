// Asks the proxy once a second while the page is visible, and again after it was unreachable.

const SECOND = 1000;
const ANSWER = 5 * SECOND;
const SLOWEST = 5 * SECOND;

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The proxy's HTTP API, relative to this page. The key stays in this object. */
export class Proxy {
  #key = null;

  get hasKey() {
    return this.#key !== null;
  }

  set key(key) {
    this.#key = key;
  }

  async ask(path, method = "GET") {
    const headers = this.#key === null ? {} : { authorization: `Bearer ${this.#key}` };
    const signal = AbortSignal.timeout(ANSWER);
    const answer = await fetch(path, { method, headers, signal, cache: "no-store", credentials: "omit" });
    const body = await answer.json();
    if (!answer.ok) throw new Refused(answer.status, body?.error?.message ?? `the proxy answered ${answer.status}`);
    return body;
  }
}

/** Calls `got(state)` with each answer, `failed(error, seconds)` while there is none. */
export class Poll {
  #proxy;
  #got;
  #failed;
  #timer = null;
  #busy = false;
  #wait = SECOND;
  #gone = null;
  #after = 0;
  #life = null;
  paused = false;
  seconds = 60; // of rates and percentiles

  constructor(proxy, got, failed) {
    [this.#proxy, this.#got, this.#failed] = [proxy, got, failed];
    document.addEventListener("visibilitychange", () => this.now());
  }

  /** Ask at once. */
  now() {
    clearTimeout(this.#timer);
    if (this.#busy || this.paused || document.hidden) return;
    void this.#ask();
  }

  async #ask() {
    this.#busy = true;
    try {
      const state = await this.#proxy.ask(`kvbelt/console.json?window=${this.seconds}&doctor=1&after=${this.#after}`);
      if (this.#life !== null && this.#life !== state.proxy.life) state.restarted = true;
      [this.#life, this.#after, this.#gone, this.#wait] = [state.proxy.life, state.after, null, SECOND];
      this.#got(state);
    } catch (error) {
      this.#gone ??= performance.now();
      this.#wait = error instanceof Refused ? SLOWEST : Math.min(this.#wait * 1.5, SLOWEST);
      this.#failed(error, (performance.now() - this.#gone) / SECOND);
    } finally {
      this.#busy = false;
      this.#timer = setTimeout(() => this.now(), this.#wait);
    }
  }
}
