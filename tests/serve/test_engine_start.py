import threading

import serve.engine
from serve.settings import Settings


def test_no_thread_but_the_engines_keeps_a_team(small, tmp_path, monkeypatch):
    """PyTorch keeps its threads for every thread that has computed, until that ends."""
    computed = []

    def load(name, **_):
        computed.append(threading.current_thread())
        return small

    monkeypatch.setattr(serve.engine.Base, "load", load)
    monkeypatch.setattr(serve.engine, "use_threads", lambda *_: computed.append(threading.current_thread()))
    _, engine = serve.engine.make_engine(Settings(store=str(tmp_path), base="tiny64", no_auth=True))
    try:
        assert len(computed) == 2
        assert not any(thread.is_alive() for thread in computed)
    finally:
        engine.close()
