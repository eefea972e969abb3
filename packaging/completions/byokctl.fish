# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_byokctl_global_optspecs
    string join \n socket= json h/help V/version
end

function __fish_byokctl_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_byokctl_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_byokctl_using_subcommand
    set -l cmd (__fish_byokctl_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c byokctl -n "__fish_byokctl_needs_command" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_needs_command" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_needs_command" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_needs_command" -s V -l version -d 'Print version'
complete -c byokctl -n "__fish_byokctl_needs_command" -f -a "demo" -d 'Show all of it in a minute: a key, a volume, the fence, and back. Needs nothing installed'
complete -c byokctl -n "__fish_byokctl_needs_command" -f -a "volume" -d 'Make, list, show and forget volumes'
complete -c byokctl -n "__fish_byokctl_needs_command" -f -a "attach" -d 'Unlock a volume and serve it'
complete -c byokctl -n "__fish_byokctl_needs_command" -f -a "detach" -d 'Stop serving a volume: drain, flush, destroy the key in memory'
complete -c byokctl -n "__fish_byokctl_needs_command" -f -a "reload" -d 'Read the settings and the definitions anew'
complete -c byokctl -n "__fish_byokctl_needs_command" -f -a "status" -d 'Say how volumes and their keys are'
complete -c byokctl -n "__fish_byokctl_needs_command" -f -a "key" -d 'Look at a customer\'s key'
complete -c byokctl -n "__fish_byokctl_needs_command" -f -a "audit" -d 'Look at the audit trail, check it, hold it against CloudTrail'
complete -c byokctl -n "__fish_byokctl_needs_command" -f -a "dev" -d 'The development KMS of `byokd --dev`'
complete -c byokctl -n "__fish_byokctl_using_subcommand demo" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand demo" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand demo" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and not __fish_seen_subcommand_from create list show resize forget" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and not __fish_seen_subcommand_from create list show resize forget" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and not __fish_seen_subcommand_from create list show resize forget" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and not __fish_seen_subcommand_from create list show resize forget" -f -a "create" -d 'Make a volume under a customer\'s key'
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and not __fish_seen_subcommand_from create list show resize forget" -f -a "list" -d 'List all volumes'
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and not __fish_seen_subcommand_from create list show resize forget" -f -a "show" -d 'Show everything known of one'
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and not __fish_seen_subcommand_from create list show resize forget" -f -a "resize" -d 'Make a volume larger, also while it is in use'
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and not __fish_seen_subcommand_from create list show resize forget" -f -a "forget" -d 'Drop a volume\'s definition; its data stays'
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from create" -l backing -d 'The file (made if it is not there) or block device that holds the ciphertext' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from create" -l size -d 'Bytes a client may use, like 10G; the header comes on top. 0 is all of a block device' -r
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from create" -l key -d 'ARN of the customer\'s KMS key' -r
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from create" -l purpose -d 'What the volume is for; part of the encryption context' -r -f -a "zeebe\t'Zeebe\'s journal and state'
elasticsearch\t'Elasticsearch\'s or OpenSearch\'s indices and translog'
documents\t'Document storage'
backup\t'Backups and snapshots'"
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from create" -l role-arn -d 'ARN of a role to assume for the key, for example in the customer\'s account' -r
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from create" -l external-id -d 'The external id that the role\'s trust policy asks for' -r
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from create" -l context -d 'KEY=VALUE to add to the encryption context; stands in clear in CloudTrail' -r
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from create" -l sector-size -d '4096 or 512' -r
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from create" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from create" -l force -d 'Format over data that is there'
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from create" -l preallocate -d 'Allocate all blocks now'
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from create" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from create" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from list" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from list" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from list" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from show" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from show" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from show" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from resize" -l size -d 'Bytes a client may use from then on, like 20G' -r
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from resize" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from resize" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from resize" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from forget" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from forget" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand volume; and __fish_seen_subcommand_from forget" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand attach" -l device -d 'As a device of the kernel: `auto` for the first free one, or /dev/nbdN' -r
complete -c byokctl -n "__fish_byokctl_using_subcommand attach" -l connections -d 'Connections of that device' -r
complete -c byokctl -n "__fish_byokctl_using_subcommand attach" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand attach" -l read-only -d 'Refuse writes'
complete -c byokctl -n "__fish_byokctl_using_subcommand attach" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand attach" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand detach" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand detach" -l force -d 'Take its kernel device away whoever uses it, and whatever hangs'
complete -c byokctl -n "__fish_byokctl_using_subcommand detach" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand detach" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand reload" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand reload" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand reload" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand status" -s w -l watch -d 'Go on saying it, this often, until interrupted' -r
complete -c byokctl -n "__fish_byokctl_using_subcommand status" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand status" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand status" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and not __fish_seen_subcommand_from check policy suspend resume rewrap recheck" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and not __fish_seen_subcommand_from check policy suspend resume rewrap recheck" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and not __fish_seen_subcommand_from check policy suspend resume rewrap recheck" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and not __fish_seen_subcommand_from check policy suspend resume rewrap recheck" -f -a "check" -d 'Try a key step by step and say what works'
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and not __fish_seen_subcommand_from check policy suspend resume rewrap recheck" -f -a "policy" -d 'Print the least policy that the customer\'s key needs'
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and not __fish_seen_subcommand_from check policy suspend resume rewrap recheck" -f -a "suspend" -d 'Fence a volume by hand and keep it so, also over a restart of the daemon'
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and not __fish_seen_subcommand_from check policy suspend resume rewrap recheck" -f -a "resume" -d 'Take a suspension back: the volume is served again when KMS allows it'
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and not __fish_seen_subcommand_from check policy suspend resume rewrap recheck" -f -a "rewrap" -d 'Wrap a volume\'s key anew, after a rotation or to move it to another KMS key'
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and not __fish_seen_subcommand_from check policy suspend resume rewrap recheck" -f -a "recheck" -d 'Ask KMS now instead of when it is due, and act upon the answer'
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from check" -l role-arn -d 'ARN of a role to assume for the key, for example in the customer\'s account' -r
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from check" -l external-id -d 'The external id that the role\'s trust policy asks for' -r
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from check" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from check" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from check" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from policy" -l principal -d 'ARN of the role that byokd uses' -r
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from policy" -l purpose -d 'Allow only volumes of this purpose' -r -f -a "zeebe\t'Zeebe\'s journal and state'
elasticsearch\t'Elasticsearch\'s or OpenSearch\'s indices and translog'
documents\t'Document storage'
backup\t'Backups and snapshots'"
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from policy" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from policy" -l rewrap -d 'Allow rewrapping as well, from and to this key'
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from policy" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from policy" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from suspend" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from suspend" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from suspend" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from resume" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from resume" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from resume" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from rewrap" -l key -d 'ARN of the KMS key to move to; without it, the one that it has' -r
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from rewrap" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from rewrap" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from rewrap" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from recheck" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from recheck" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand key; and __fish_seen_subcommand_from recheck" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and not __fish_seen_subcommand_from verify tail export reconcile head" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and not __fish_seen_subcommand_from verify tail export reconcile head" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and not __fish_seen_subcommand_from verify tail export reconcile head" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and not __fish_seen_subcommand_from verify tail export reconcile head" -f -a "verify" -d 'Check that no record was changed, removed, added or moved'
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and not __fish_seen_subcommand_from verify tail export reconcile head" -f -a "tail" -d 'Show the latest records of a running daemon'
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and not __fish_seen_subcommand_from verify tail export reconcile head" -f -a "export" -d 'Print records as they stand in the trail, one a line'
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and not __fish_seen_subcommand_from verify tail export reconcile head" -f -a "reconcile" -d 'Hold the trail against an export of the customer\'s CloudTrail events'
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and not __fish_seen_subcommand_from verify tail export reconcile head" -f -a "head" -d 'Print the last record\'s SEQ:HASH, to be kept elsewhere'
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from verify" -l dir -d 'The directory of a trail; without it, that of the running daemon' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from verify" -l expect -d 'SEQ:HASH that was noted elsewhere and has to be in it; may be repeated' -r
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from verify" -l public-key -d 'The public key that checkpoints have to be signed with: hex, or a PEM file' -r
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from verify" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from verify" -l partial -d 'Earlier files lie elsewhere'
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from verify" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from verify" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from tail" -l volume -d 'Only this volume\'s' -r
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from tail" -s n -l last -d 'How many' -r
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from tail" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from tail" -s f -l follow -d 'Go on as new ones come'
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from tail" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from tail" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from export" -l dir -d 'The directory of a trail; without it, that of the running daemon' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from export" -l from -d 'From this time (RFC 3339) or number on' -r
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from export" -l to -d 'Up to this time or number' -r
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from export" -l volume -d 'Only this volume\'s' -r
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from export" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from export" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from export" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from reconcile" -l dir -d 'The directory of the trail; without it, that of the running daemon' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from reconcile" -l principal -d 'ARN of a role or user that is byokd\'s, besides those that are found; may be repeated' -r
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from reconcile" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from reconcile" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from reconcile" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from head" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from head" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand audit; and __fish_seen_subcommand_from head" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand dev; and not __fish_seen_subcommand_from key" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand dev; and not __fish_seen_subcommand_from key" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand dev; and not __fish_seen_subcommand_from key" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand dev; and not __fish_seen_subcommand_from key" -f -a "key" -d 'Keys of the development KMS'
complete -c byokctl -n "__fish_byokctl_using_subcommand dev; and __fish_seen_subcommand_from key" -l state-dir -d 'Where `byokd --dev` keeps its state' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand dev; and __fish_seen_subcommand_from key" -l socket -d 'The daemon\'s control socket [default: /run/byokd/byokd.sock]' -r -F
complete -c byokctl -n "__fish_byokctl_using_subcommand dev; and __fish_seen_subcommand_from key" -l json -d 'Answer in JSON, one object'
complete -c byokctl -n "__fish_byokctl_using_subcommand dev; and __fish_seen_subcommand_from key" -s h -l help -d 'Print help'
complete -c byokctl -n "__fish_byokctl_using_subcommand dev; and __fish_seen_subcommand_from key" -f -a "create" -d 'Make a key and print its ARN'
complete -c byokctl -n "__fish_byokctl_using_subcommand dev; and __fish_seen_subcommand_from key" -f -a "list" -d 'List keys with their states'
complete -c byokctl -n "__fish_byokctl_using_subcommand dev; and __fish_seen_subcommand_from key" -f -a "disable" -d 'Disable a key: what a customer does to take it away at once'
complete -c byokctl -n "__fish_byokctl_using_subcommand dev; and __fish_seen_subcommand_from key" -f -a "enable" -d 'Enable a disabled key'
complete -c byokctl -n "__fish_byokctl_using_subcommand dev; and __fish_seen_subcommand_from key" -f -a "deny" -d 'Deny its use by its policy'
complete -c byokctl -n "__fish_byokctl_using_subcommand dev; and __fish_seen_subcommand_from key" -f -a "allow" -d 'Allow its use by its policy again'
complete -c byokctl -n "__fish_byokctl_using_subcommand dev; and __fish_seen_subcommand_from key" -f -a "delete" -d 'Schedule its deletion'
complete -c byokctl -n "__fish_byokctl_using_subcommand dev; and __fish_seen_subcommand_from key" -f -a "restore" -d 'Cancel its deletion, and enable it'
