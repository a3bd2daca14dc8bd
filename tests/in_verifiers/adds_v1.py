"""An environment of verifiers.v1: sums, asked by the agent without tools."""

import verifiers.v1 as vf


class SumData(vf.TaskData):
    a: int


class SumTask(vf.Task[SumData]):
    @vf.reward(weight=2.0)
    async def long(self, trace) -> float:
        """How long the reply is; there is none for one."""
        if self.data.a == 2:
            raise ValueError("no such sum")
        return len(trace.last_reply) / 10


class SumTaskset(vf.Taskset[SumTask, vf.TasksetConfig]):
    def load(self):
        for a in range(4):
            yield SumTask(SumData(prompt=f"What is {a} + 1?", a=a), self.config.task)


__all__ = ["SumTaskset"]
