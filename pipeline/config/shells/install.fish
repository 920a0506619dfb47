# Completion of gpt-oss-qat for fish. Use: gpt-oss-qat --shell-completion install=fish | source

function _gpt_oss_qat_complete
    set -l word (commandline -ct)
    set -l typed (commandline -opc)
    set -l program $typed[1] -m pipeline
    switch (basename -- $typed[1])
        case gpt-oss-qat
            set program $typed[1]
        case launch
            set program @PYTHON@
    end
    set -l found (_GPT_OSS_QAT_BEFORE=$typed[-1] $program --shell-completion "query=$word" 2>/dev/null | string match -v '')
    if test (count $found) -gt 0
        printf '%s\n' $found
    else if string match -q -- '*=*' $word
        set -l key (string split -m 1 = -- $word)
        for path in (__fish_complete_path $key[2])
            printf '%s=%s\n' $key[1] $path
        end
    else
        __fish_complete_path $word
    end
end

function _gpt_oss_qat_is_module
    set -l typed (commandline -opc)
    test (count $typed) -ge 3; and test "$typed[2] $typed[3]" = "-m pipeline"
end

complete -c gpt-oss-qat -f -a '(_gpt_oss_qat_complete)'
complete -c launch -f -a '(_gpt_oss_qat_complete)'
complete -c python -n _gpt_oss_qat_is_module -f -a '(_gpt_oss_qat_complete)'
complete -c python3 -n _gpt_oss_qat_is_module -f -a '(_gpt_oss_qat_complete)'
