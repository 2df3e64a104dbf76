"""Memory goes back to the system after compilations that took long, and after no others."""

import jax

from saro_jax.parallel import memory


def test_memory_is_trimmed_after_a_long_compilation_alone(monkeypatch):
    class Library:
        trimmed = 0

        def malloc_trim(self, pad: int) -> int:
            assert pad == 0
            self.trimmed += 1
            return 1

    library = Library()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: library)
    listeners = []
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", listeners.append)
    memory.trim_after_compiling.__wrapped__()
    (compiled,) = listeners
    compiled(memory.COMPILED, 2.0, fun_name="step")
    compiled(memory.COMPILED, 0.01)
    compiled("/jax/core/compile/jaxpr_trace_duration", 2.0)
    assert library.trimmed == 1


def test_the_event_is_what_jax_reports():
    heard = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        heard.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x * 3.25 + 1)(1.0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert memory.COMPILED in heard


def test_without_glibc_nothing_is_registered(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", lambda _: 1 / 0)
    memory.trim_after_compiling.__wrapped__()
