complete -c byokd -l config -d 'Configuration file' -r -F
complete -c byokd -l state-dir -d 'With --dev: where keys, sockets and definitions go' -r -F
complete -c byokd -l probe-interval -d 'With --dev: time between probes' -r
complete -c byokd -l http-port -d 'With --dev: the port of 127.0.0.1 for metrics, JSON API and console; any free one without, and the file http-endpoint under --state-dir says which' -r
complete -c byokd -l log -d 'What to log: error, warn, info, debug, trace, or a filter per module; trace of libraries, which shows secrets, is never written' -r
complete -c byokd -l check -d 'Reads the settings and all definitions, says what is wrong with them, and ends: 0 if nothing is, else 2'
complete -c byokd -l dev -d 'For trials: an embedded KMS, no configuration, everything under --state-dir'
complete -c byokd -s h -l help -d 'Print help'
complete -c byokd -s V -l version -d 'Print version'
