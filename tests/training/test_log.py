"""The log of a run beside other processes."""

from finetune.training.log import RunLog


class Cores:
    def __init__(self):
        self.started = 0

    def start(self):
        self.started += 1

    def explain(self):
        return "the cores are busy" if self.started else None


def test_busy_cores_are_named_at_a_line_of_the_log(tmp_path, capsys):
    log = RunLog(tmp_path, every=2, cores=Cores())
    log.start(4)
    values = {"samples": 1, "tokens": 1, "seconds": 1.0, "loss": 1.0}
    log.step(1, **values)
    assert "busy" not in capsys.readouterr().out
    log.step(2, **values)
    assert "the cores are busy" in capsys.readouterr().out
    log.close()
