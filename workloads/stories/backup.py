"""g. A backup to a second encrypted volume, with a key of its own: the program merges and backs up what it has, loses it,
and restores it after both volumes were detached. While the backup's key is denied there is nothing to restore from."""

from parts.disk import FileSystem, NbdDisk

from .setting import Setting, go_on_for


class Shelf:
    """The second volume, with ext4."""

    def __init__(self, setting):
        self.setting, self.key = setting, setting.byokd.key()
        mib = setting.program.volume_mib
        setting.byokd.create("backup", setting.scratch / "backup.img", f"{mib}M", self.key, "backup")
        self.directory = setting.scratch / "backup"
        self.make = True

    def mount(self):
        s = self.setting
        s.byokd.ctl("attach", "backup")
        self.disk = NbdDisk(s.stack, s.byokd.uri("backup"), s.scratch / "nbd-backup")
        self.files = FileSystem(s.stack, self.disk, self.directory, self.make)
        self.make = False

    def unmount(self):
        self.files.unmount()
        self.disk.close()
        self.setting.byokd.ctl("detach", "backup")


def story(stack, report, make_program, seed, quick):
    s = Setting(stack, report, make_program, seed)
    shelf = Shelf(s)
    shelf.mount()
    s.program.back_up_to(shelf.directory)
    s.begin()
    go_on_for(report, "the load runs", s.program, 5 if quick else 60)
    s.program.halt()
    report.event("merging")
    report.number("merged in", s.program.merge(), "s")
    report.event("backing up")
    report.number("backed up in", s.program.back_up(), "s")
    s.program.lose()
    report.event("lost on purpose")
    s.program.stop()
    s.unmount()
    shelf.unmount()
    s.byokd.ctl("detach", "v")

    s.byokd.ctl("dev", "key", "disable", shelf.key)
    code, answer = s.byokd.call("attach", "backup")
    report.check(f"the backup is not to be had while its key is denied: {answer.get('why')}", code == 3)
    s.byokd.ctl("dev", "key", "enable", shelf.key)

    s.byokd.ctl("attach", "v")
    shelf.mount()
    s.mount("attached again")
    s.program.start(s.data)
    report.event("restoring")
    report.number("restored in", s.program.restore(), "s")
    s.everything_is_there("restored")
    s.program.load()
    go_on_for(report, "the load runs again", s.program, 3 if quick else 20)
    series = s.conclude()
    shelf.unmount()
    return series
